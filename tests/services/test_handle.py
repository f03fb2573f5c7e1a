import asyncio

import pytest

from grpo.actors.marks import replayed_on_join
from grpo.config.operation import RecoveryConfig
from grpo.errors import ActorDied, ConfigError, LeaseLost, PayloadLost
from grpo.services.failures import Failures
from grpo.services.handle import ActorHandle
from grpo.services.local import LocalEndpoint
from grpo.services.replica import Call, LazyArg, PreemptionState, ServiceContext, State, Timeouts
from grpo.services.service import Service


class Echo:
    """An actor whose processes can be told apart."""

    def __init__(self, name):
        self.name, self.gate, self.asked = name, asyncio.Event(), asyncio.Event()
        self.loaded, self.closed, self.restored = None, False, []

    async def setup(self):
        """Up at once."""

    async def say(self, word):
        return f"{self.name}: {word}"

    async def wait(self):
        self.asked.set()
        await self.gate.wait()
        return self.name

    async def fail(self):
        raise KeyError(self.name)

    async def lose_lease(self):
        raise LeaseLost("the generator died")

    @replayed_on_join
    async def load(self, weights):
        self.loaded = weights
        return self.name

    async def restore(self, state):
        self.restored.append(state)

    async def close(self):
        self.closed = True


class Fleet:
    """A service of Echoes, with every process that was ever started by name."""

    def __init__(
        self, replicas=1, *, setup=None, placed=None, max_restarts=20, timeouts=None, preemption=None, **options
    ):
        self.processes: list[Echo] = []
        self.endpoints: list[LocalEndpoint] = []
        self.failures = Failures(RecoveryConfig(max_restarts=max_restarts))
        self._setup, self._placed = setup, placed
        common = ServiceContext(self._spawn, self.failures, timeouts or Timeouts(), preemption or PreemptionState())
        self.service = Service("echo", common, replicas, replayed_on_join=frozenset({"load"}), **options)
        self.handle = ActorHandle(self.service)

    def _spawn(self, name):
        echo = Echo(f"{name}/{len(self.processes)}")
        if self._setup is not None:
            echo.setup = lambda: self._setup(echo)
        self.processes.append(echo)
        self.endpoints.append(LocalEndpoint(echo, name))
        if self._placed is not None:
            self.endpoints[-1].wait_scheduled = self._placed
        return self.endpoints[-1]

    def states(self):
        return [replica.state for replica in self.service.replicas]

    async def __aenter__(self):
        await self.service.ready()
        return self

    async def __aexit__(self, *exception):
        await self.service.close(1.0)


async def settle():
    """Let every other task run until it waits."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_call_one_reaches_the_only_process():
    async with Fleet() as fleet:
        assert await fleet.handle.say.call_one("hi") == "echo/0: hi"


async def test_call_one_refuses_a_service_of_several():
    async with Fleet(2) as fleet:
        with pytest.raises(TypeError, match="echo has 2 processes"):
            await fleet.handle.say.call_one("hi")


async def test_call_and_fanout_reach_all_in_order():
    async with Fleet(3) as fleet:
        expected = [f"echo-{i}/{i}: hi" for i in range(3)]
        assert await fleet.handle.say.call("hi") == expected
        assert await fleet.handle.say.fanout(word="hi") == expected


async def test_route_takes_the_replica_with_the_fewest_calls_under_way():
    async with Fleet(2) as fleet:
        first, second = (asyncio.ensure_future(fleet.handle.wait.route()) for _ in range(2))
        await asyncio.gather(*(process.asked.wait() for process in fleet.processes))
        fleet.processes[1].gate.set()
        assert await second == "echo-1/1"
        assert await fleet.handle.say.route("hi") == "echo-1/1: hi"
        fleet.processes[0].gate.set()
        assert await first == "echo-0/0"
        assert [replica.in_flight for replica in fleet.service.replicas] == [0, 0]


async def test_an_exception_is_raised_at_the_await_and_the_call_is_over():
    async with Fleet(2) as fleet:
        with pytest.raises(KeyError):
            await fleet.handle.fail.route()
        with pytest.raises(KeyError):
            await fleet.handle.fail.fanout()
        assert [replica.in_flight for replica in fleet.service.replicas] == [0, 0]
        assert fleet.failures.restarts == {}


async def test_a_call_that_a_dying_replica_takes_with_it_is_made_by_another():
    async with Fleet(2) as fleet:
        waiting = asyncio.ensure_future(fleet.handle.wait.route())
        await fleet.processes[0].asked.wait()
        fleet.processes[1].gate.set()
        fleet.endpoints[0].kill()
        assert await waiting == "echo-1/1"
        await settle()
        assert fleet.failures.restarts == {"echo-0": 1}
        figures = fleet.handle.replica_stats()
        assert (figures["echo-0"]["failures"], figures["echo-1"]["failures"]) == (1, 0)


async def test_with_one_replica_only_callers_wait_for_its_return():
    async with Fleet() as fleet:
        waiting = [asyncio.ensure_future(fleet.handle.wait.call_one()) for _ in range(3)]
        await fleet.processes[0].asked.wait()
        fleet.endpoints[0].kill()
        late = asyncio.ensure_future(fleet.handle.say.route("late"))
        assert await late == "echo/1: late"
        fleet.processes[1].gate.set()
        assert await asyncio.gather(*waiting) == ["echo/1"] * 3
        assert fleet.failures.restarts == {"echo": 1}  # three calls failed, one process died


async def test_a_process_that_dies_while_nobody_calls_is_replaced_too():
    async with Fleet() as fleet:
        fleet.endpoints[0].kill()
        await asyncio.wait_for(fleet.service.context.changed.wait_for(lambda: len(fleet.processes) == 2), 5)
        assert await fleet.handle.say.route("hi") == "echo/1: hi"


async def test_a_replacement_serves_nothing_until_it_holds_the_present_weights():
    gate, starts = asyncio.Event(), []

    async def setup(echo):
        starts.append(echo)
        if len(starts) > 2:
            await gate.wait()

    async with Fleet(2, setup=setup) as fleet:
        await fleet.handle.load.fanout("v1")
        fleet.endpoints[0].kill()
        await asyncio.sleep(0)
        assert await fleet.handle.say.fanout("hi") == ["echo-1/1: hi"]
        assert await fleet.handle.load.fanout("v2") == ["echo-1/1"]  # nobody waits for the one that is starting
        gate.set()
        await fleet.service.ready()
        assert [process.loaded for process in fleet.processes] == ["v1", "v2", "v2"]


async def test_weights_that_are_published_while_a_replacement_loads_are_loaded_as_well():
    async with Fleet(2) as fleet:
        await fleet.handle.load.fanout("v1")
        loading, go_on = asyncio.Event(), asyncio.Event()
        original = Echo.load

        async def slow(self, weights):
            if weights == "v1":
                loading.set()
                await go_on.wait()
            return await original(self, weights)

        Echo.load = slow
        try:
            fleet.endpoints[0].kill()
            await loading.wait()
            assert await fleet.handle.load.fanout("v2") == ["echo-1/1"]
            assert fleet.states() == [State.STALE, State.HEALTHY]
            go_on.set()
            await fleet.service.ready()
        finally:
            Echo.load = original
        assert fleet.processes[2].loaded == "v2"


async def test_a_fanout_leaves_out_the_replica_that_dies_under_it():
    async with Fleet(2) as fleet:
        answers = asyncio.ensure_future(fleet.handle.wait.fanout())
        await asyncio.gather(*(process.asked.wait() for process in fleet.processes))
        fleet.endpoints[0].kill()
        fleet.processes[1].gate.set()
        assert await answers == ["echo-1/1"]


async def test_a_call_that_comes_a_moment_after_the_death_does_not_reach_a_process_that_is_starting():
    async def setup(echo):
        if len(fleet.processes) == 2:
            await hang()

    fleet = Fleet(setup=setup)
    async with fleet:
        fleet.endpoints[0].kill()
        await until_processes(fleet, 2)
        with pytest.raises(ActorDied, match="echo is starting"):
            await fleet.service.replicas[0].attempt(Call("say", ("hi",)))


async def test_a_fanout_waits_for_one_when_all_have_died():
    async with Fleet() as fleet:
        fleet.endpoints[0].kill()
        assert await fleet.handle.load.fanout("v1") == ["echo/1"]


async def test_what_a_replacement_needs_is_restored_before_calls_are_made_again():
    async with Fleet() as fleet:
        order = []

        async def restore(replica):
            order.append(await replica.say.call_one("restoring"))
            await replica.restore.call_one("state")

        fleet.handle.on_restart(restore)
        waiting = asyncio.ensure_future(fleet.handle.wait.call_one())
        await fleet.processes[0].asked.wait()
        fleet.endpoints[0].kill()
        fleet.endpoints[0].kill()
        order.append(await fleet.handle.say.call_one("hi"))
        assert order == ["echo/1: restoring", "echo/1: hi"]
        assert fleet.processes[1].restored == ["state"]
        waiting.cancel()


async def test_a_replacement_that_dies_while_it_is_restored_is_replaced_again():
    async with Fleet() as fleet:
        tries = []

        async def restore(replica):
            tries.append(replica)
            if len(tries) == 1:
                fleet.endpoints[-1].kill()
            await replica.restore.call_one("state")

        fleet.handle.on_restart(restore)
        fleet.endpoints[0].kill()
        assert await fleet.handle.say.call_one("hi") == "echo/2: hi"
        assert fleet.failures.restarts == {"echo": 2}


async def test_an_error_in_the_restoring_reaches_every_caller():
    async with Fleet() as fleet:

        async def restore(replica):
            raise ValueError("cannot be restored")

        fleet.handle.on_restart(restore)
        fleet.endpoints[0].kill()
        for _ in range(2):
            with pytest.raises(ValueError, match="cannot be restored"):
                await fleet.handle.say.call_one("hi")


async def test_a_spent_budget_reaches_every_caller():
    async with Fleet(max_restarts=1) as fleet:
        fleet.endpoints[0].kill()
        assert await fleet.handle.say.call_one("hi") == "echo/1: hi"
        waiting = asyncio.ensure_future(fleet.handle.wait.call_one())
        await fleet.processes[1].asked.wait()
        fleet.endpoints[1].kill()
        for call in (waiting, fleet.handle.say.call_one("hi")):
            with pytest.raises(
                ActorDied, match=r"echo died: it was killed; no restarts left .recovery\.max_restarts=1 "
            ):
                await call


async def test_a_setup_that_fails_is_raised_with_its_type_and_not_tried_again():
    async def setup(echo):
        raise ConfigError("no such thing", key="a.key")

    fleet = Fleet(2, setup=setup)
    with pytest.raises(ConfigError, match=r"a\.key: no such thing"):
        await fleet.service.ready()
    assert len(fleet.processes) == 2
    await fleet.service.close(1.0)


async def test_a_process_that_never_comes_up_is_not_tried_again():
    async def setup(echo):
        raise ActorDied("out of memory")

    fleet = Fleet(setup=setup)
    with pytest.raises(ActorDied, match="out of memory"):
        await fleet.service.ready()
    assert len(fleet.processes) == 1
    await fleet.service.close(1.0)


SOON = Timeouts(start_s=0.05, health_interval_s=0.01, health_timeout_s=0.01)
PATIENT = Timeouts(start_s=0.5, health_interval_s=0.01, health_timeout_s=0.5)  # those that live answer in time


async def hang():
    await asyncio.Event().wait()


async def until_processes(fleet, number):
    await asyncio.wait_for(fleet.service.context.changed.wait_for(lambda: len(fleet.processes) == number), 5)


async def test_a_process_that_does_not_answer_is_killed_and_replaced():
    async with Fleet(timeouts=SOON) as fleet:
        waiting = asyncio.ensure_future(fleet.handle.wait.call_one())
        await fleet.processes[0].asked.wait()
        fleet.endpoints[0].ping = hang
        await until_processes(fleet, 2)
        fleet.processes[1].gate.set()
        assert await waiting == "echo/1"
        assert fleet.failures.deaths[0].error == "echo did not answer for 0.01 s (recovery.health_timeout_s)"


async def test_a_replacement_that_hangs_while_it_is_brought_up_to_date_is_replaced_too():
    async with Fleet(timeouts=PATIENT) as fleet:

        async def restore(replica):
            if len(fleet.processes) == 2:
                fleet.endpoints[1].ping = hang
                await hang()

        fleet.handle.on_restart(restore)
        fleet.endpoints[0].kill()
        assert await fleet.handle.say.call_one("hi") == "echo/2: hi"
        assert "did not answer" in fleet.failures.deaths[1].error


async def test_a_replacement_that_gets_no_place_is_tried_again_and_costs_no_budget():
    async def setup(echo):
        if len(fleet.processes) in (2, 3):
            await hang()

    fleet = Fleet(setup=setup, timeouts=PATIENT, max_restarts=1)
    async with fleet:
        fleet.endpoints[0].kill()
        assert await fleet.handle.say.call_one("hi") == "echo/3: hi"
        assert fleet.failures.restarts == {"echo": 1}


async def test_a_timeout_in_a_setup_is_raised_as_it_is():
    async def setup(echo):
        raise TimeoutError("the hub does not answer")

    fleet = Fleet(setup=setup)
    with pytest.raises(TimeoutError, match="the hub does not answer"):
        await fleet.service.ready()
    await fleet.service.close(1.0)


async def test_optional_replicas_step_back_while_a_required_one_has_no_place():
    """There is one place. A pending optional replica gets it as soon as the required one dies, and would keep it."""
    preemption, place, taken = PreemptionState(), asyncio.Semaphore(1), asyncio.Event()

    async def setup(echo):
        await place.acquire()
        if "-" in echo.name:
            taken.set()
            try:
                await hang()
            finally:
                place.release()

    async with (
        Fleet(preemption=preemption, setup=setup) as required,
        Fleet(0, preemption=preemption, setup=setup, optional_replicas=2) as optional,
    ):
        await settle()
        assert (required.states(), optional.states()) == ([State.HEALTHY], [State.STARTING] * 2)
        place.release()
        await taken.wait()
        required.endpoints[0].kill()
        assert await required.handle.say.call_one("hi") == "echo/1: hi"
        assert optional.states() == [State.STARTING] * 2


async def test_an_optional_replica_leaves_for_a_required_one_that_finds_no_place_and_comes_back_later():
    preemption, place = PreemptionState(patience_s=0.01), asyncio.Event()
    place.set()
    async with (
        Fleet(preemption=preemption, placed=place.wait) as required,
        Fleet(1, preemption=preemption, optional_replicas=1) as extended,
    ):
        await settle()
        assert extended.states() == [State.HEALTHY] * 2
        longest = asyncio.ensure_future(extended.handle.wait.route())
        await extended.processes[0].asked.wait()
        moved = asyncio.ensure_future(extended.handle.wait.route())  # to the optional one
        await extended.processes[1].asked.wait()
        place.clear()
        required.endpoints[0].kill()
        while extended.states() != [State.HEALTHY, State.STARTING]:
            await preemption.changed.wait()
        with pytest.raises(ActorDied):
            await extended.endpoints[1].ping()
        place.set()
        assert await required.handle.say.call_one("hi") == "echo/1: hi"
        while extended.states() != [State.HEALTHY] * 2:
            await preemption.changed.wait()
        assert extended.failures.restarts == {}
        assert not longest.done()
        assert not moved.done()
        longest.cancel(), moved.cancel()


async def test_what_was_lost_with_its_node_is_fetched_anew_for_newcomers_and_for_those_that_serve():
    fetched, lost = [], {1, 3}

    async def setup(echo):
        load = echo.load

        async def load_what_is_there(weights):
            if weights in lost:
                raise PayloadLost("the weights are gone")
            return await load(weights)

        echo.load = load_what_is_there

    async def fetch():
        fetched.append(len(fetched) + 1)
        return fetched[-1]

    async with Fleet(2, setup=setup) as fleet:
        weights = LazyArg(fetch)
        await fleet.handle.load.fanout(weights)
        assert [process.loaded for process in fleet.processes] == [2, 2]
        lost.add(2)
        fleet.endpoints[1].kill()
        await settle()
        assert fleet.states() == [State.HEALTHY] * 2
        assert fleet.processes[2].loaded == 4
        await fleet.handle.load.fanout(weights)  # nobody forgets what another has fetched anew
        assert fetched == [1, 2, 3, 4]


async def test_what_was_lost_and_nobody_can_fetch_is_an_error():
    async def setup(echo):
        async def load(weights):
            raise PayloadLost("the weights are gone")

        echo.load = load

    async with Fleet(setup=setup) as fleet:
        with pytest.raises(PayloadLost):
            await fleet.handle.load.fanout(1)


async def test_an_error_that_nobody_can_mend_ends_the_run_though_nobody_calls():
    async with Fleet(max_restarts=0) as fleet:
        fleet.endpoints[0].kill()
        with pytest.raises(ActorDied, match=r"recovery\.max_restarts=0"):
            await asyncio.wait_for(fleet.failures.wait_fatal(), 60)


async def test_a_lease_counts_as_a_call_and_gives_a_process_that_others_can_call():
    async with Fleet(2) as fleet:
        async with fleet.handle.lease() as first, fleet.handle.lease() as second:
            assert {first.name, second.name} == {"echo-0", "echo-1"}
            assert await first.invoke("say", ("a",)) == f"{fleet.processes[0].name}: a"
            assert [replica.in_flight for replica in fleet.service.replicas] == [1, 1]
        assert [replica.in_flight for replica in fleet.service.replicas] == [0, 0]


async def test_a_lease_that_is_lost_is_the_death_of_the_process():
    async with Fleet(1) as fleet:
        with pytest.raises(LeaseLost):
            async with fleet.handle.lease():
                raise LeaseLost("its caller could not reach it")
        async with fleet.handle.lease() as lease:  # waits for the replacement
            assert await lease.invoke("say", ("a",)) == "echo/1: a"
        assert fleet.failures.restarts == {"echo": 1}


async def test_another_process_that_dies_during_a_lease_is_not_its_death():
    async with Fleet(1) as fleet:
        with pytest.raises(ActorDied):
            async with fleet.handle.lease():
                raise ActorDied("the environment is gone")
        assert await fleet.handle.say.route("a") == "echo/0: a"
        assert fleet.failures.restarts == {}


async def test_the_loss_of_a_lease_says_nothing_about_whoever_reports_it():
    async with Fleet(1) as fleet:
        with pytest.raises(LeaseLost):
            await fleet.handle.lose_lease.route()
        assert fleet.failures.restarts == {}


async def test_a_replica_that_is_removed_serves_its_leases_to_the_end():
    async with Fleet(2) as fleet:
        async with fleet.handle.lease(), fleet.handle.lease() as second:
            fleet.handle.scale(1)
            await settle()
            assert await second.invoke("say", ("a",)) == "echo-1/1: a"
        await settle()
        assert fleet.processes[1].closed


async def test_replicas_are_added_during_a_run_and_hold_the_present_weights_when_they_serve():
    async with Fleet() as fleet:
        await fleet.handle.load.fanout("v1")
        fleet.handle.scale(3)
        await fleet.service.context.changed.wait_for(lambda: fleet.states().count(State.HEALTHY) == 3)
        assert [process.loaded for process in fleet.processes] == ["v1"] * 3
        assert len(await fleet.handle.say.fanout("hi")) == 3


async def test_replicas_that_are_removed_finish_what_they_have_and_get_nothing_new():
    async with Fleet(2) as fleet:
        first, second = (asyncio.ensure_future(fleet.handle.wait.route()) for _ in range(2))
        await asyncio.gather(*(process.asked.wait() for process in fleet.processes))
        fleet.handle.scale(1)
        assert fleet.states() == [State.HEALTHY, State.STOPPED]
        assert await fleet.handle.say.fanout("hi") == ["echo-0/0: hi"]
        for process in fleet.processes:
            process.gate.set()
        assert await second == "echo-1/1"
        await settle()
        assert len(fleet.service.replicas) == 1
        assert fleet.processes[1].closed
        assert fleet.failures.restarts == {}
        await first
        fleet.handle.scale(0)
        assert await fleet.handle.say.route("hi") == "echo-0/0: hi"  # one stays


async def test_healthy_replicas_are_the_last_to_leave():
    async def setup(echo):
        if "echo-0" in echo.name and len(fleet.processes) > 2:
            await hang()

    fleet = Fleet(2, setup=setup)
    async with fleet:
        fleet.endpoints[0].kill()
        await settle()
        assert fleet.states() == [State.STARTING, State.HEALTHY]
        fleet.handle.scale(1)
        await settle()
        assert fleet.states() == [State.HEALTHY]
        assert await fleet.handle.say.route("hi") == "echo-1/1: hi"


async def test_a_replica_that_dies_while_it_finishes_hands_its_calls_on():
    async with Fleet(2) as fleet:
        calls = [asyncio.ensure_future(fleet.handle.wait.route()) for _ in range(2)]
        await asyncio.gather(*(process.asked.wait() for process in fleet.processes))
        fleet.handle.scale(1)
        fleet.endpoints[1].kill()
        fleet.processes[0].gate.set()
        assert await asyncio.gather(*calls) == ["echo-0/0", "echo-0/0"]
        await settle()
        assert fleet.states() == [State.HEALTHY]


async def test_a_replica_that_has_no_place_yet_can_be_taken_back():
    async def setup(echo):
        if "echo-1" in echo.name:
            await asyncio.Event().wait()

    async with Fleet(1, optional_replicas=1, setup=setup) as fleet:
        assert fleet.states() == [State.HEALTHY, State.STARTING]
        fleet.handle.scale(1)
        await settle()
        assert len(fleet.service.replicas) == 1
        assert await fleet.handle.say.route("hi") == "echo-0/0: hi"


async def test_leaving_closes_every_process():
    async with Fleet(2) as fleet:
        pass
    assert all(process.closed for process in fleet.processes)
    with pytest.raises(ActorDied):
        await fleet.endpoints[0].invoke("say", ("hi",))

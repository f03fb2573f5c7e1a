import asyncio

import pytest

from grpo.config.operation import WatchdogConfig
from grpo.driver.watchdog import Watchdog
from grpo.errors import StalledError
from grpo.telemetry.activity import begin_activity, describe_blocked, waiting_for
from grpo.utils.aio import Signal, gather_or_cancel, race


async def wait(group, *whats):
    begin_activity(group)

    async def one(what):
        with waiting_for(what):
            await asyncio.Event().wait()

    await gather_or_cancel(*map(one, whats))


async def test_a_stalled_run_fails_and_says_who_waits_for_what():
    waits = [wait("rollouts", "generator.generate") for _ in range(3)]
    waits += [
        wait("rollouts", "reward.score", "reference.logprobs"),
        wait("training", "a batch"),
    ]
    begin_activity("the test")
    tasks = [asyncio.ensure_future(one) for one in waits]
    message = (
        r"^no progress for 0.02 s \(watchdog.seconds\)\. Blocked: 3 rollouts on generator.generate \(oldest 0 s\); "
        r"rollouts on reference.logprobs and reward.score \(0 s\); training on a batch \(0 s\)$"
    )
    with pytest.raises(StalledError, match=message):
        await Watchdog(WatchdogConfig(seconds=0.02), Signal(), print).watch()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert describe_blocked() == "nothing is blocked on an actor"


async def test_progress_keeps_the_watchdog_quiet():
    progress = Signal()
    watching = asyncio.ensure_future(Watchdog(WatchdogConfig(seconds=5), progress, print).watch())
    for _ in range(5):
        await asyncio.sleep(0)
        progress.notify()
    assert not watching.done()
    watching.cancel()


async def test_a_warning_is_a_setting():
    warned, twice = [], asyncio.Event()

    def warn(message):
        warned.append(message)
        if len(warned) == 2:
            twice.set()

    config = WatchdogConfig(seconds=0.01, action="warn")
    watching = asyncio.ensure_future(Watchdog(config, Signal(), warn).watch())
    await asyncio.wait_for(twice.wait(), 60)
    watching.cancel()
    assert [message.partition(" s ")[0] for message in warned] == [
        "no progress for 0.01", "no progress for 0.02",
    ]  # fmt: skip


async def test_work_under_watch_gives_its_result_or_its_error_or_the_stall():
    async def answer():
        return 42

    async def fail():
        raise KeyError("its own")

    ended = asyncio.Event()

    async def hang():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    dog = Watchdog(WatchdogConfig(seconds=0.02), Signal(), print)
    assert await race(answer(), dog.watch()) == 42
    with pytest.raises(KeyError, match="its own"):
        await race(fail(), dog.watch())
    with pytest.raises(StalledError):
        await race(hang(), dog.watch())
    assert ended.is_set()


def test_outside_of_any_activity_a_wait_is_not_noted():
    with waiting_for("something"):
        assert describe_blocked() == "nothing is blocked on an actor"


async def test_a_task_that_an_activity_starts_may_be_one_of_its_own_and_is_forgotten_when_it_ends():
    begin_activity("training")

    async def evaluate():
        begin_activity("evaluation")
        with waiting_for("answers"):
            await asyncio.sleep(0)
            return describe_blocked()

    task = asyncio.ensure_future(evaluate())
    with waiting_for("a batch"):
        assert await task == "Blocked: training on a batch (0 s); evaluation on answers (0 s)"
    assert describe_blocked() == "nothing is blocked on an actor"

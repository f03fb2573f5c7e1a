"""The driver's queue of prompts, and how the difficulty of problems shapes the stream on a real dataloader."""

import asyncio
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from grpo.actors.dataloader import Dataloader
from grpo.config.algorithm import DataloaderConfig
from grpo.driver.pacing import Pacer
from grpo.driver.prompts import Difficulty, PromptQueue
from grpo.services.handle import ActorHandle
from grpo.services.local import LocalEndpoint
from grpo.telemetry.activity import begin_activity, describe_blocked
from grpo.types import Problem, Prompt, PromptBatch
from tests.fakes import service_of


class CountingDataloader:
    """A stream in which every prompt whose serial is divisible by `skips` is too long."""

    def __init__(self, skips=1_000_000):
        self.calls, self._skips = [], skips

    async def sample(self, start, count, left_out=()):
        self.calls.append((start, count))
        await asyncio.sleep(0)
        serials = [serial for serial in range(start, start + 2 * count + 2) if serial == 0 or serial % self._skips][
            :count
        ]
        return PromptBatch(tuple(self._prompt(serial) for serial in serials), serials[-1] + 1)

    async def prompt(self, serial):
        return self._prompt(serial)

    def _prompt(self, serial):
        return Prompt(serial, Problem("q", "a"), np.array([1]))


def make_queue(dataloader, pacer, bulk):
    return PromptQueue(ActorHandle(service_of(LocalEndpoint(dataloader))), pacer, bulk)


async def test_prompts_come_in_bulk_and_in_order_however_many_wait():
    dataloader, pacer = CountingDataloader(), Pacer(30)
    queue = make_queue(dataloader, pacer, bulk=8)
    tickets = [await pacer.admit() for _ in range(20)]
    prompts = await asyncio.gather(*map(queue.prompt_for, tickets))
    assert [prompt.serial for prompt in prompts] == list(range(20))
    assert dataloader.calls == [(0, 8), (8, 8), (16, 8)]


async def test_a_cancelled_waiter_costs_no_prompt():
    pacer = Pacer(30)
    queue = make_queue(CountingDataloader(), pacer, bulk=4)
    tickets = [await pacer.admit() for _ in range(4)]
    waiters = [asyncio.ensure_future(queue.prompt_for(ticket)) for ticket in tickets[:3]]
    await asyncio.sleep(0)
    waiters[1].cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    assert [waiters[0].result().serial, waiters[2].result().serial] == [0, 1]
    assert (await queue.prompt_for(tickets[3])).serial == 2


async def test_a_group_that_is_made_again_gets_the_same_prompt_and_counts_once():
    pacer = Pacer(30)
    queue = make_queue(CountingDataloader(), pacer, bulk=4)
    tickets = [await pacer.admit() for _ in range(3)]
    before = [(await queue.prompt_for(ticket)).serial for ticket in tickets]
    pacer.requeue(tickets[1:], "lost")
    again = [await pacer.admit() for _ in range(2)]
    assert again == tickets[1:]
    assert [(await queue.prompt_for(ticket)).serial for ticket in again] == before[1:]
    assert queue.counts() == {"handed_out": 3, "skipped_length": 0, "left_out_difficulty": 0}


async def test_a_queue_goes_on_from_the_first_prompt_that_nobody_has():
    pacer = Pacer(30)
    queue = make_queue(CountingDataloader(skips=3), pacer, bulk=8)
    assert [(await queue.prompt_for(await pacer.admit())).serial for _ in range(4)] == [0, 1, 2, 4]
    assert queue.counts() == {"handed_out": 4, "skipped_length": 1, "left_out_difficulty": 0}
    other = make_queue(CountingDataloader(skips=3), pacer, bulk=8)
    await other.restore(queue.state())
    assert [(await other.prompt_for(await pacer.admit())).serial for _ in range(3)] == [5, 7, 8]
    # with 9, which was fetched ahead of 10
    assert other.counts() == {"handed_out": 7, "skipped_length": 3, "left_out_difficulty": 0}


async def test_who_waits_while_another_fetches_is_said_to_wait():
    begin_activity("rollouts")
    pacer, gate = Pacer(30), asyncio.Event()

    class SlowDataloader(CountingDataloader):
        async def sample(self, *place):
            await gate.wait()
            return await super().sample(*place)

    queue = make_queue(SlowDataloader(), pacer, bulk=4)
    tickets = [await pacer.admit() for _ in range(3)]
    waiters = [asyncio.ensure_future(queue.prompt_for(ticket)) for ticket in tickets[:2]]
    await asyncio.sleep(0)
    assert "prompts" in describe_blocked()
    gate.set()
    await asyncio.gather(*waiters)
    await queue.prompt_for(tickets[2])
    assert describe_blocked() == "nothing is blocked on an actor"


SOLVED, NEVER, SOMETIMES = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 1.0)
PROBLEMS, BULK, REVISIT = 50, 8, 0.2


def prompt_of(problem_index):
    return Prompt(0, Problem("q", "a"), None, problem_index)


@pytest.mark.parametrize("rewards", [SOLVED, NEVER, (0.3, 0.3, 0.3)])
def test_a_group_of_one_reward_leaves_its_problem_out_until_one_has_a_spread(rewards):
    difficulty = Difficulty()
    difficulty.record_rewards(prompt_of(7), SOMETIMES)
    assert difficulty.left_out == frozenset()
    difficulty.record_rewards(prompt_of(7), rewards)
    difficulty.record_rewards(prompt_of(3), rewards)
    before = difficulty.left_out
    assert before == {3, 7}
    difficulty.record_rewards(prompt_of(7), SOMETIMES)
    assert difficulty.left_out == {3}
    assert before == {3, 7}  # it may still be on its way to the dataloader


def test_what_is_known_survives_json():
    difficulty = Difficulty([5, 2, 9])
    assert Difficulty(json.loads(json.dumps(difficulty.state()))).left_out == {2, 5, 9}


class Stream:
    """A run without a model: what a problem's group earns is what `rewards_of` says of its index."""

    def __init__(self, config, rewards_of, by_difficulty):
        self.config, self.rewards_of, self.calls = config, rewards_of, []
        self.pacer = Pacer(1)
        self.endpoint = LocalEndpoint(None)
        self.queue = PromptQueue(ActorHandle(service_of(self.endpoint)), self.pacer, BULK, by_difficulty)

    async def new_dataloader(self):
        """As after a kill: the one before is gone with all that it knew."""
        dataloader = Dataloader(self.config)
        await dataloader.setup()
        sample = dataloader.sample

        async def noted(*args):
            self.calls.append(args)
            return await sample(*args)

        dataloader.sample = noted
        self.endpoint.actor = dataloader
        return self

    async def next(self):
        ticket = await self.pacer.admit()
        prompt = await self.queue.prompt_for(ticket)
        self.queue.record_rewards(prompt, self.rewards_of(prompt.problem_index))
        self.pacer.release([ticket])
        return prompt

    async def take(self, count):
        return [await self.next() for _ in range(count)]

    async def epochs(self, first, last):
        """How often each problem comes in these epochs; all are taken up to the last."""
        prompts = []
        while self.queue.next_serial < last * PROBLEMS:
            prompts.append(await self.next())
        assert_adds_up(self.queue)
        return Counter(prompt.problem_index for prompt in prompts if prompt.serial // PROBLEMS >= first)


def assert_adds_up(queue):
    assert sum(queue.counts().values()) == queue.next_serial


def serials(prompts):
    return [prompt.serial for prompt in prompts]


@pytest.fixture
def stream(tiny_config):
    async def make(rewards_of, *, by_difficulty=True, revisit=REVISIT, max_prompt_tokens=16):
        sampling = DataloaderConfig("difficulty" if by_difficulty else "uniform", revisit)
        rollout = replace(tiny_config.rollout, max_prompt_tokens=max_prompt_tokens)
        config = replace(tiny_config, dataloader=sampling, rollout=rollout)
        return await Stream(config, rewards_of, by_difficulty).new_dataloader()

    return make


def thirds(index):
    """A third of the problems is always solved, one never, one is what the model is learning."""
    return (SOLVED, NEVER, SOMETIMES)[index % 3]


async def test_problems_solved_always_or_never_become_rare_and_the_others_stay(stream):
    epochs = 100
    counts = await (await stream(thirds)).epochs(2, epochs)
    learning = [index for index in range(PROBLEMS) if index % 3 == 2]
    settled = [index for index in range(PROBLEMS) if index % 3 != 2]
    assert {counts[index] for index in learning} == {epochs - 2}  # once in every epoch, as before
    mean = sum(counts[index] for index in settled) / len(settled)
    assert mean / (epochs - 2) == pytest.approx(REVISIT, abs=0.02)
    assert all(counts[index] > 0 for index in settled)


@pytest.mark.parametrize("revisit", [0.02, 0.2, 1.0])
async def test_the_stream_never_dries_up_when_all_is_left_out(stream, revisit):
    endless = await stream(lambda index: NEVER, revisit=revisit)
    await endless.epochs(0, 2)
    start = endless.queue.next_serial
    await endless.take(400)
    assert 400 / (endless.queue.next_serial - start) == pytest.approx(revisit, rel=0.15)
    assert_adds_up(endless.queue)


async def test_what_has_become_easy_or_hard_again_is_noticed(stream):
    changing = await stream(lambda index: NEVER)
    await changing.epochs(0, 10)
    changing.rewards_of = lambda index: SOMETIMES
    await changing.epochs(10, 50)  # revisited by then
    counts = await changing.epochs(50, 60)
    assert counts == dict.fromkeys(range(PROBLEMS), 10)


async def test_prompts_over_the_length_limit_are_told_apart_from_those_left_out(stream):
    short = await stream(thirds, max_prompt_tokens=5)
    dataloader = short.endpoint.actor
    too_long = [serial for serial in range(PROBLEMS) if dataloader._prompt(serial) is None]
    assert 0 < len(too_long) < PROBLEMS
    prompts = []
    while short.queue.next_serial < 20 * PROBLEMS:
        prompts += await short.take(1)
        assert_adds_up(short.queue)
    counts, before = short.queue.counts(), range(short.queue.next_serial)
    assert counts["handed_out"] == len(prompts)
    assert counts["skipped_length"] == sum(dataloader._prompt(serial) is None for serial in before)
    assert counts["left_out_difficulty"] > 0


async def test_uniform_sampling_takes_no_notice(stream):
    uniform = await stream(lambda index: NEVER, by_difficulty=False)
    assert serials(await uniform.take(3 * PROBLEMS)) == list(range(3 * PROBLEMS))
    assert [left_out for _, _, left_out in uniform.calls] == [frozenset()] * len(uniform.calls)
    assert uniform.queue.state()["difficulty"] == []


async def test_a_new_dataloader_goes_on_the_same(stream):
    undisturbed, killed = await stream(thirds), await stream(thirds)
    expected = serials(await undisturbed.take(300))
    prompts = []
    for _ in range(30):
        prompts += serials(await killed.take(10))
        await killed.new_dataloader()
    assert prompts == expected


async def test_a_prompt_that_was_handed_out_is_found_when_its_problem_is_left_out(stream):
    left_out = await stream(lambda index: NEVER)
    for prompt in await left_out.take(100):
        again = await left_out.endpoint.actor.prompt(prompt.serial)
        assert (again.problem, again.problem_index) == (prompt.problem, prompt.problem_index)


@pytest.mark.parametrize("by_difficulty", [True, False])
async def test_a_resumed_run_goes_on_the_same_wherever_it_was_stopped(stream, by_difficulty):
    """Also between two fetches, where what was fetched is older than what is known."""
    undisturbed = await stream(thirds, by_difficulty=by_difficulty, max_prompt_tokens=6)
    resumed = undisturbed
    for _ in range(60):
        state = json.loads(json.dumps(resumed.queue.state()))
        resumed = await stream(thirds, by_difficulty=by_difficulty, max_prompt_tokens=6)
        await resumed.queue.restore(state)
        assert resumed.queue.state() == state
        assert serials(await resumed.take(5)) == serials(await undisturbed.take(5))
        assert resumed.queue.counts() == undisturbed.queue.counts()


async def test_a_checkpoint_of_a_version_that_knew_no_difficulty_is_accepted(stream):
    resumed = await stream(thirds)
    await resumed.queue.restore({"next_serial": 60, "handed_out": 55})
    assert serials(await resumed.take(3)) == [60, 61, 62]
    assert resumed.queue.counts() == {"handed_out": 58, "skipped_length": 5, "left_out_difficulty": 0}

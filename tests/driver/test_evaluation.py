"""Evaluation beside the real loop, with simulated engines; its arithmetic by itself."""

import asyncio
import json
import math
from itertools import combinations

import numpy as np
import pytest

from grpo.driver.evaluation import evaluate, held_out_prompts, pass_at_k, summarize
from grpo.driver.loop import train_loop
from grpo.errors import ActorDied, MixedVersionsError, PayloadLost, RewardError, StalledError
from grpo.services.failures import Failures
from grpo.services.handle import EvaluationServices
from grpo.services.local import launch_local
from grpo.types import Completion, EvaluationReport, GenerationReport, Scores
from tests.fakes import CountingTrainer, GatedAnswers, OverwritingTrainer


@pytest.fixture
def config(tiny_config):
    """A training on simulated engines that is evaluated every 5 of 20 steps, by an evaluator."""
    tiny_config.generator.engine = "simulated"
    tiny_config.generator.args = {"latency_s": 0.002, "mean_tokens": 4}
    tiny_config.rollout.concurrency = 16
    tiny_config.trainer.max_steps = 20
    tiny_config.eval.prompts, tiny_config.eval.every, tiny_config.eval.samples = 6, 5, 2
    return tiny_config


class Run:
    """The loop with a counting trainer; its outcome, whatever it was."""

    def __init__(self, config, make_recorder):
        self.config = config
        self.recorder = make_recorder(config)
        self.pacer = self.recorder.pacer
        self.trainer = CountingTrainer()
        self.shutdown = asyncio.Event()

    async def __call__(self, gate=None):
        """With a `gate`, who answers held-out prompts waits in front of it."""
        async with launch_local(self.config, self.recorder.failures, {"trainer": self.trainer}) as services:
            if gate is not None:
                gate.guard(services.evaluator or services.generator)
            try:
                await train_loop(services, self.config, self.recorder, self.shutdown)
            finally:
                self.summary = self.recorder.write_summary("over")
                self.recorder.run_dir.close()
        return self

    @property
    def lines(self):
        text = (self.recorder.run_dir.path / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    @property
    def evaluated(self):
        return [report.step for report in self.recorder.history.evaluations]


@pytest.fixture
def loop(config, make_recorder):
    return Run(config, make_recorder)


def nothing_is_left_running():
    return asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("replicas", [1, 0], ids=["evaluator", "borrowed"])
@pytest.mark.parametrize(("every", "expected"), [(0, [0, 20]), (8, [0, 8, 16, 20]), (10, [0, 10, 20]), (100, [0, 20])])
async def test_evaluations_are_due_at_the_start_every_so_often_and_at_the_end(loop, replicas, every, expected):
    loop.config.eval.every, loop.config.eval.replicas = every, replicas
    loop.config.generator.args["latency_s"] = 0.0005
    await loop()
    assert sorted({*loop.evaluated, *skipped(loop)}) == expected
    assert loop.evaluated[-1] == 20


def skipped(loop):
    return [line["step"] for line in loop.lines if "eval/skipped" in line]


async def test_without_prompts_nothing_is_evaluated(loop):
    loop.config.eval.prompts = 0
    async with launch_local(loop.config, loop.recorder.failures, {"trainer": loop.trainer}) as services:
        assert services.evaluator is None
    await loop()
    assert loop.evaluated == []
    assert not any(name.startswith(("eval", "time/eval")) for line in loop.lines for name in line)


async def test_training_goes_on_while_one_version_is_evaluated_and_others_are_skipped(loop):
    """The held-out answers of step 0 wait until step 12 is trained: 5 and 10 are skipped, 15 is evaluated."""
    gate = GatedAnswers()
    loop.trainer = OpeningTrainer(gate, at=12)
    await loop(gate)
    assert loop.evaluated == [0, 15, 20]
    assert skipped(loop) == [5, 10]
    assert loop.summary["evaluations_skipped"] == 2
    line = next(line for line in loop.lines if "eval/step" in line)
    assert (line["eval/step"], line["step"]) == (0, 13)


class OpeningTrainer(CountingTrainer):
    """Opens a gate after some steps and lets the evaluation end, or closes it between two evaluations."""

    def __init__(self, gate, at, close=False):
        super().__init__()
        self._gate, self._at, self._close = gate, at, close

    async def train_step(self, batch):
        if self.version == self._at and self._close:
            await evaluation_over()
            self._gate.close()
        elif self.version == self._at:
            await self._gate.asked.wait()
            self._gate.open()
            await evaluation_over()
        return await super().train_step(batch)


async def evaluation_over():
    if running := [task for task in asyncio.all_tasks() if task.get_name().startswith("evaluation-")]:
        await asyncio.wait(running)


async def test_the_last_evaluation_waits_for_the_one_that_runs(loop):
    gate = GatedAnswers()
    running = asyncio.ensure_future(loop(gate))
    await loop.trainer.until(20)
    await asyncio.sleep(0.01)
    assert (loop.trainer.version, len(loop.lines)) == (20, 19)  # the last line waits for the last evaluation
    gate.open()
    await running
    assert loop.evaluated == [0, 20]
    assert (loop.lines[-1]["step"], loop.lines[-1]["eval/step"]) == (20, 20)
    assert loop.lines[-1]["time/eval_s"] > 0.01


async def test_an_evaluator_holds_still_while_the_generators_move_on(loop):
    """Its weights are read before the trainer writes to their buffer again, and replaced only for the next one."""
    gate = GatedAnswers()
    loop.trainer = OpeningTrainer(gate, at=4)
    await loop(gate)
    versions = [version for version, _ in gate.answered]
    assert versions == sorted(versions)
    assert versions.count(0) == 6
    assert set(versions) == set(loop.evaluated)


async def test_the_weights_are_loaded_before_their_buffer_is_written_to_again(loop):
    """An evaluator that is slow to load holds up the next publication."""
    loop.config.generator.args["load_s"] = 0.01
    loop.trainer = OverwritingTrainer()
    gate = GatedAnswers()
    gate.open()
    await loop(gate)
    assert gate.loaded == [(version, version) for version in loop.evaluated]


@pytest.mark.parametrize("replicas", [1, 0], ids=["evaluator", "borrowed"])
async def test_an_answer_by_another_version_is_an_error(loop, replicas):
    loop.config.eval.replicas = replicas
    gate = GatedAnswers(report_version=7)
    gate.open()
    with pytest.raises(MixedVersionsError, match="the evaluation of version 0 was answered by versions 0 to 7"):
        await loop(gate)
    assert nothing_is_left_running()


class LosingAnswers(GatedAnswers):
    """The evaluator dies in an evaluation, and the weights of version 0 with it."""

    def __init__(self):
        super().__init__(error=ActorDied("evaluator died with its node"))

    def guard(self, handle):
        super().guard(handle)
        spawn = handle.service.context.spawn

        def spawn_without(name):
            endpoint = spawn(name)
            invoke = endpoint.invoke

            async def losing(method, args=(), kwargs=None):
                if method == "update_weights" and args[0].version == 0:
                    raise PayloadLost("with its node")
                return await invoke(method, args, kwargs)

            endpoint.invoke = losing
            return endpoint

        handle.service.context.spawn = spawn_without


async def test_an_evaluator_that_was_replaced_and_finds_only_newer_weights_leaves_its_evaluation_out(loop):
    gate = LosingAnswers()
    loop.trainer = OpeningTrainer(gate, at=3)
    await loop(gate)
    assert loop.recorder.failures.restarts == {"evaluator": 1}
    assert 0 not in loop.evaluated
    assert loop.evaluated[-1] == 20
    assert skipped(loop)[0] == 4


async def test_without_an_evaluator_the_training_waits_and_the_generators_hold_still(loop):
    loop.config.eval.replicas = 0
    gate = GatedAnswers()
    running = asyncio.ensure_future(loop(gate))
    await gate.asked.wait()
    await asyncio.sleep(0.05)
    assert loop.trainer.version == 0
    gate.open()
    await running
    assert loop.evaluated == [0, 5, 10, 15, 20]
    waits = [line["step"] for line in loop.lines if "time/eval_s" in line]
    assert waits == [1, 5, 10, 15, 20]
    assert loop.lines[0]["time/eval_s"] > 0
    assert loop.lines[0]["time/step_s"] < loop.lines[0]["wall_s"] - 0.04


async def test_every_evaluation_draws_the_same_numbers(loop):
    """The simulated engine's lengths follow from the seed alone, whatever the version."""
    await loop()
    first, *others = loop.recorder.history.evaluations
    assert others
    assert {report.token_count for report in others} == {first.token_count}


async def test_metrics_and_summary_carry_the_results(loop):
    loop.config.eval.samples = 4
    await loop()
    carried = [line for line in loop.lines if "eval/step" in line]
    assert len(loop.lines) == 20
    assert carried[-1]["eval/step"] == 20
    assert set(carried[0]) >= {
        "eval/reward_mean", "eval/reward_stderr", "eval/pass@1", "eval/pass@2", "eval/pass@4", "eval/prompts",
        "eval/completion_tokens_mean", "eval/truncated_fraction", "eval/seconds",
    }  # fmt: skip
    reports = loop.recorder.history.evaluations
    assert [record["step"] for record in loop.summary["evaluations"]] == loop.evaluated
    assert loop.summary["eval_first"] == reports[0].reward_mean > 0
    assert loop.summary["eval_last"] == reports[-1].reward_mean


async def test_temperature_and_samples_are_the_evaluations_own(loop):
    loop.config.eval.temperature, loop.config.eval.samples = 0.0, 1
    gate = GatedAnswers()
    gate.open()
    await loop(gate)
    assert {(params.temperature, params.n) for _, params in gate.answered} == {(0.0, 1)}


async def test_a_shutdown_cancels_an_evaluation_beside_the_training(loop):
    loop.config.trainer.max_steps = 10**6
    running = asyncio.ensure_future(loop(GatedAnswers()))
    await loop.trainer.until(10)
    loop.shutdown.set()
    await running
    assert loop.evaluated == []
    assert len(loop.lines) == loop.trainer.version > 0
    assert nothing_is_left_running()


@pytest.mark.parametrize("replicas", [1, 0], ids=["evaluator", "borrowed"])
async def test_a_shutdown_ends_the_wait_for_the_last_evaluation(loop, replicas):
    """The line of the last step is written all the same."""
    loop.config.eval.every, loop.config.eval.replicas = 20, replicas
    gate = GatedAnswers()
    gate.open()
    loop.trainer = OpeningTrainer(gate, at=19, close=True)
    running = asyncio.ensure_future(loop(gate))
    await gate.asked.wait()
    loop.shutdown.set()
    async with asyncio.timeout(60):
        await running
    assert loop.evaluated == [0]
    assert [line["step"] for line in loop.lines] == list(range(1, 21))
    assert (loop.summary["eval_last"], loop.summary["steps"]) == (None, 20)
    assert nothing_is_left_running()


@pytest.mark.parametrize("replicas", [1, 0], ids=["evaluator", "borrowed"])
async def test_who_answers_may_die_and_every_answer_is_there_all_the_same(config, make_recorder, replicas):
    config.eval.replicas, config.generator.args = replicas, {"latency_s": 0.02, "mean_tokens": 4}
    recorder, trainer = make_recorder(config), CountingTrainer()
    async with launch_local(config, recorder.failures, {"trainer": trainer}) as services:
        (replica,) = (services.evaluator or services.generator).service.replicas

        async def kill_after(step):
            await trainer.until(step)
            await asyncio.sleep(0.01)  # an evaluation is due, and under way
            replica.kill()

        kills = [asyncio.ensure_future(kill_after(step)) for step in (0, 5, 10)]
        await train_loop(services, config, recorder, asyncio.Event())
        await asyncio.gather(*kills)
    assert list(recorder.failures.restarts.values()) == [3]
    assert {report.step for report in recorder.history.evaluations} >= {0, 20}
    assert {(report.prompts, report.completion_count) for report in recorder.history.evaluations} == {(6, 12)}


async def test_an_evaluation_that_fails_ends_the_run_with_its_error(loop):
    gate = GatedAnswers(error=ZeroDivisionError("no answer"))
    gate.open()
    with pytest.raises(ZeroDivisionError, match="no answer"):
        await loop(gate)
    assert nothing_is_left_running()


async def test_the_watchdog_bounds_an_evaluation(loop):
    loop.config.watchdog.seconds = 1.0
    loop.config.trainer.max_steps = 10**6
    with pytest.raises(StalledError, match=r"for 1 s .* answers on evaluator.generate"):
        await loop(GatedAnswers())
    assert len(loop.lines) > 1
    assert nothing_is_left_running()


async def test_prompts_whose_reward_fails_are_left_out_and_counted(loop):
    loop.config.reward.functions = {"tests.fake_rewards:sometimes_raising": 1.0}
    loop.config.reward.on_error = "drop"
    await loop()
    report = loop.recorder.history.evaluations[0]
    assert report.prompts + report.prompts_left_out == 6
    assert 0 < report.prompts < 6
    assert report.completion_count == 2 * report.prompts


async def test_a_reward_that_fails_is_raised_unless_it_may_be_dropped(config):
    config.reward.functions = {"tests.fake_rewards:raising": 1.0}
    async with launch_local(config, Failures(config.recovery), {"trainer": CountingTrainer()}) as launched:
        services = EvaluationServices(launched.dataloader, launched.generator, launched.reward)
        prompts = await held_out_prompts(services, config)
        with pytest.raises(RewardError, match="cannot score this"):
            await evaluate(services, config, prompts, version=0)
        config.reward.on_error = "drop"
        report = await evaluate(services, config, prompts, version=0)
    assert (report.prompts, report.prompts_left_out) == (0, 6)


async def test_every_prompt_is_told_of_as_it_is_done(config):
    config.reward.functions = {"tests.fake_rewards:sometimes_raising": 1.0}
    config.reward.on_error = "drop"
    told = {}

    def warn(prompt, scores):
        told[prompt.serial] = scores

    async with launch_local(config, Failures(config.recovery), {"trainer": CountingTrainer()}) as launched:
        services = EvaluationServices(launched.dataloader, launched.generator, launched.reward)
        prompts = await held_out_prompts(services, config)
        report = await evaluate(services, config, prompts, 0, warn)
    assert sorted(told) == [prompt.serial for prompt in prompts]
    assert list(told.values()).count(None) == report.prompts_left_out > 0


class Crowd:
    """Answers once all prompts are there; notes in which turn of the event loop each call began."""

    def __init__(self, count):
        self._barrier = asyncio.Barrier(count)
        self.turn, self.began_in = 0, []

    async def count_turns(self):
        while True:
            self.turn += 1
            await asyncio.sleep(0)

    async def generate(self, prompt, params):
        self.began_in.append(self.turn)
        await self._barrier.wait()
        completion = Completion(np.array([5]), np.zeros(1, np.float32), ((0, 1),), "stop")
        return [completion] * params.n, GenerationReport(0, 0, (1,) * params.n, (False,) * params.n)


async def test_prompts_are_answered_side_by_side_but_begun_one_a_turn_of_the_loop(config):
    config.task.args["held_out_size"] = config.eval.prompts = 150
    crowd = Crowd(150)
    async with launch_local(
        config, Failures(config.recovery), {"trainer": CountingTrainer(), "generator": crowd}
    ) as launched:
        services = EvaluationServices(launched.dataloader, launched.generator, launched.reward)
        prompts = await held_out_prompts(services, config)
        counting = asyncio.ensure_future(crowd.count_turns())
        report = await evaluate(services, config, prompts, version=0)
        counting.cancel()
    assert report.prompts == len(crowd.began_in) == 150
    assert len(set(crowd.began_in)) == 150


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("solved", range(6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(solved, k):
    completions = [True] * solved + [False] * (5 - solved)
    subsets = [any(subset) for subset in combinations(completions, k)]
    assert pass_at_k(5, solved, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples_is_a_number():
    assert pass_at_k(4096, 1, 1024) == pytest.approx(0.25)


def answer(*rewards):
    count = len(rewards)
    return Scores(rewards, {}, ()), GenerationReport(3, 3, (10,) * count, (True,) + (False,) * (count - 1))


def test_a_report_adds_up(config):
    config.eval.samples, config.eval.success_threshold = 4, 0.5
    report = summarize([answer(1, 0, 0, 0.5), answer(0, 0, 0.25, 0), None], config, version=3, seconds=2.0)
    assert report == EvaluationReport(
        step=3,
        prompts=2,
        prompts_left_out=1,
        reward_mean=pytest.approx((0.375 + 0.0625) / 2),
        reward_stderr=pytest.approx((0.375 - 0.0625) / 2),  # of two: half their distance
        pass_at={1: 0.25, 2: pytest.approx((1 - 1 / 6) / 2), 4: 0.5},
        completion_count=8,
        token_count=80,
        truncated_count=2,
        seconds=2.0,
    )
    record = report.as_record()
    assert (record["completion_tokens_mean"], record["truncated_fraction"], record["tokens_per_s"]) == (10, 0.25, 40)


def test_an_evaluation_without_a_scored_prompt_has_no_mean(config):
    report = summarize([None], config, version=0, seconds=1.0)
    assert math.isnan(report.reward_mean)
    assert (report.prompts, report.prompts_left_out) == (0, 1)

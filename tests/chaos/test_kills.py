"""A real run on real Ray, whose processes are killed one after another: it trains on as if nothing had been."""

import asyncio

import pytest

from grpo.cluster.launch import launch
from grpo.driver.loop import train_loop
from tests.chaos.monkey import Monkey

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.long]

KINDS = ("generator", "trainer", "dataloader", "replay_buffer", "reference")


@pytest.fixture
def config(tiny_config):
    """Two generators, two ranks, a reference, and more steps than the monkey leaves time for."""
    tiny_config.rollout.concurrency = 16
    tiny_config.generator.replicas, tiny_config.generator.num_cpus = 2, 0.5
    tiny_config.trainer.ranks, tiny_config.trainer.num_cpus = 2, 0.5
    tiny_config.buffer.max_policy_age = 3  # so that groups lie in the replay buffer when it is killed
    tiny_config.reward.workers, tiny_config.reward.replicas = 1, 2
    tiny_config.loss.beta = 0.05
    tiny_config.trainer.lr = 1e-3
    tiny_config.trainer.max_steps = 1_000_000
    return tiny_config


@pytest.mark.parametrize("scored_by", ["reward", "environment"])
async def test_whatever_is_killed_the_run_goes_on_and_its_ledger_adds_up(
    config, make_recorder, kills, capsys, scored_by
):
    if scored_by == "environment":  # episodes of several turns
        config.task.target, config.task.args = "tests.fake_environments:Words", {}
        config.rollout.max_completion_tokens, config.environment.replicas = 24, 2
    recorder, shutdown = make_recorder(config), asyncio.Event()
    async with launch(config, recorder.failures) as services:
        monkey = Monkey(services, recorder.failures, kinds=(*KINDS, scored_by), kills=kills, seed=7)

        async def trained_again():
            """The death was noticed, and a step trained since."""
            deaths = monkey.killed.total()
            while len(recorder.failures.deaths) < deaths or recorder.failures.deaths[-1].next_step_s is None:
                await recorder.failures.progress.wait()

        async def rampage():
            await recorder.failures.progress.wait()
            await monkey.rampage(trained_again)
            shutdown.set()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(train_loop(services, config, recorder, shutdown))
            tasks.create_task(rampage())
    summary = recorder.write_summary("interrupted")
    recorder.run_dir.close()
    with capsys.disabled():
        report(summary)

    assert summary["restarts"] == monkey.killed
    assert monkey.killed.total() == kills
    assert summary["max_policy_age_seen"] <= config.age_bound
    steps = recorder.run_dir.read("metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["trainer/reference_kl"] > 0
    assert summary["groups_admitted"] == summary["groups_trained"] + summary["groups_in_flight"]
    assert summary["groups_trained"] == len(steps) * config.trainer.groups_per_step
    trained = [entry for line in recorder.run_dir.read("ledger.jsonl") for entry in line.get("trained", ())]
    tickets, prompts = zip(*trained, strict=True)
    assert len(set(tickets)) == len(set(prompts)) == len(trained) == summary["groups_trained"]
    handed_out = set(range(summary["prompts"]["handed_out"]))
    missing = handed_out - set(prompts)
    assert set(prompts) <= handed_out
    assert len(missing) <= summary["groups_in_flight"]


def report(summary):
    recovery = summary["recovery"]
    print(
        f"\n{len(recovery['deaths'])} kills in {summary['steps']} steps; seconds until the actor was back: median "
        f"{recovery['back_s_median']:.1f}, worst {recovery['back_s_max']:.1f}; until the next step was trained: median "
        f"{recovery['next_step_s_median']:.1f}, worst {recovery['next_step_s_max']:.1f}; groups made again: "
        f"{summary['groups_requeued']}"
    )

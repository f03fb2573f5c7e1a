"""A policy of several turns learns what is best, and learns it from what it is told in between."""

import asyncio
import json

from grpo.driver.loop import train_loop
from grpo.services.local import launch_local


async def test_a_bandit_of_two_turns_is_solved(tiny_config, make_recorder):
    config = tiny_config
    config.task.target, config.task.args = "tests.fake_environments:Bandit", {}
    config.environment.max_turn_tokens = 1
    config.rollout.group_size, config.trainer.groups_per_step = 16, 4
    config.trainer.max_steps, config.trainer.lr = 80, 3e-3
    recorder = make_recorder(config)
    async with launch_local(config, recorder.failures) as services:
        await train_loop(services, config, recorder, asyncio.Event())
    recorder.run_dir.close()
    steps = [json.loads(line) for line in (recorder.run_dir.path / "metrics.jsonl").read_text().splitlines()]
    rewards = [step["reward/mean"] for step in steps]
    assert sum(rewards[:3]) / 3 < 0.5
    # At its best, not at the end: once nearly all is solved, one step may still take too much back (5 of 24 runs).
    assert max(sum(rewards[i : i + 5]) / 5 for i in range(len(rewards) - 4)) > 0.9
    assert {step["episode/turns"] for step in steps if "episode/turns" in step} == {2.0}
    gaps = [step.get("mismatch/logprob_abs_diff_same_version", 0.0) for step in steps]
    assert 0 < max(gaps) < 1e-4

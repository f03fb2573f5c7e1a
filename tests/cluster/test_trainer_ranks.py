"""Two ranks of the real trainer on real Ray, against the loop in one process, which has one rank."""

import asyncio
import dataclasses
import json
import os
import shutil
import signal

import pytest

from grpo.checkpoint.resume import find_resume_point
from grpo.checkpoint.store import checkpoints
from grpo.cluster.launch import launch
from grpo.config.algorithm import TaskConfig
from grpo.driver.loop import train_loop
from grpo.observe.collector import collecting
from grpo.services.local import launch_local

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.long]


@pytest.fixture
def config(tiny_config):
    """What is sampled depends on the weights alone."""
    tiny_config.buffer.max_policy_age = 0
    tiny_config.rollout.concurrency = 1
    tiny_config.loss.beta = 0.05
    tiny_config.correction.mode, tiny_config.correction.max_ratio = "mask", 5.0
    tiny_config.trainer.updates_per_batch = 2
    tiny_config.trainer.max_steps = 5
    tiny_config.trainer.num_cpus = 0.5
    tiny_config.checkpoint.every, tiny_config.checkpoint.keep = 2, 99
    return tiny_config


async def train(launched, config, make_recorder, folder, *, kill=()):
    """The lines of the steps. Behind each of the first steps the next rank of `kill` is killed."""
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, dir=f"{folder}/checkpoints"))
    point, _ = find_resume_point(config, folder)
    recorder = make_recorder(config, folder)
    if point is not None:
        recorder.run_dir.cut(point.progress["files"])
    recorder.run_dir.write("config.yaml", "")
    async with launched(config, recorder.failures) as services:

        async def killing():
            for rank in kill:
                await recorder.failures.progress.wait()
                replica = await services.trainer.service.available()
                os.kill(replica.endpoint.processes()[rank].pid, signal.SIGKILL)

        timeline = recorder.timeline(1.0)
        async with (
            collecting(services, recorder.failures.progress, recorder.measured, timeline),
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(train_loop(services, config, recorder, asyncio.Event(), point))
            tasks.create_task(killing())
    recorder.run_dir.close()
    assert recorder.failures.restarts == ({"trainer": len(kill)} if kill else {})
    return recorder.run_dir.read("metrics.jsonl")


@pytest.mark.parametrize("task", ["sorting", "words"])
async def test_a_run_goes_on_with_two_ranks_and_learns_what_one_does_though_one_of_them_is_killed(
    config, make_recorder, tmp_path, task
):
    if task == "words":  # episodes of three turns
        config.task = TaskConfig("tests.fake_environments:WordsAtOnce")
        config.rollout.max_completion_tokens, config.environment.max_turn_tokens = 24, 1
    alone = await train(launch_local, config, make_recorder, tmp_path / "run")
    half = shutil.copytree(tmp_path / "run", tmp_path / "half")
    for later in set(checkpoints(half / "checkpoints")) - {half / "checkpoints/step_000002"}:
        shutil.rmtree(later)
    config.resume, config.trainer = str(half), dataclasses.replace(config.trainer, ranks=2)
    together = await train(launch, config, make_recorder, half, kill=(1,))
    assert any(step["loss"] for step in alone)
    assert [step["step"] for step in together] == [1, 2, 3, 4, 5]
    for name in ("loss", "reward/mean", "trainer/grad_norm", "trainer/entropy", "trainer/tokens"):
        assert [step[name] for step in together] == pytest.approx([step[name] for step in alone], abs=1e-4), name
    saved = (len(list(half.glob(f"checkpoints/step_{step:06d}/trainer*.safetensors"))) for step in (2, 5))
    assert list(saved) == [1, 2]
    events = json.loads((half / "timeline.json").read_text())
    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"trainer-0", "trainer-1"} <= processes

"""What is vLLM's own: its processes, its settings, a pretrained model, a whole run on Ray. Run by `make test-vllm`."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from engine_helpers import full_logprobs, greedy, greedy_tokens, lively, weights_of

from grpo.actors.generator import make_engine
from grpo.config.algorithm import TaskConfig
from grpo.config.schema import RunConfig
from grpo.driver.rollout import sample_group
from grpo.engines.base import Limits
from grpo.engines.vllm.engine import VLLMEngine
from grpo.environments import Message, Opening, Reply
from grpo.errors import ActorDied, ConfigError
from grpo.models import smollm2
from grpo.models.loading import load_model
from grpo.models.tiny import character_tokenizer, tiny_llama
from grpo.models.tokenizer import load_tokenizer
from grpo.services.failures import Failures
from grpo.services.local import launch_local
from grpo.telemetry.recording import Recording, record_in
from grpo.types import Problem, Prompt, SamplingParams
from grpo.weights.payload import WeightsWriter, parameter_shapes
from tests.scripts.processes import finish, processes_of

LIMITS = Limits(max_prompt_tokens=64, max_completion_tokens=200, max_sequences=16)


@pytest.fixture
def folder(tmp_path):
    lively(tiny_llama(width=64, layers=2, heads=2), 1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


async def start(folder, **settings):
    shapes = parameter_shapes(tiny_llama(width=64, layers=2, heads=2))
    engine = VLLMEngine(
        str(folder),
        stop_token_ids=(),
        shapes=shapes,
        limits=LIMITS,
        threads=1,
        settings={"dtype": "float32", **settings},
    )
    return await engine.start()


def engine_processes(parent):
    children = psutil.Process(parent).children(recursive=True)
    return [child for child in children if "VLLM" in " ".join(child.cmdline())]


def wait_until_gone(processes, seconds=10):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive


async def test_tokens_of_prompts_are_counted_as_read_or_kept(folder):
    recording = Recording()
    record_in(recording)
    engine = await start(folder, block_size=32)
    counts = []
    for length in (40, 60):  # the second turn of an episode, of which vLLM keeps whole blocks
        await engine.generate(np.arange(2, 2 + length), SamplingParams(seed=3, max_tokens=2, keep_prefix=True))
        figures = recording.metrics.drain()
        counts.append([figures[f"generator/prompt_tokens_{what}/sum"] for what in ("read", "kept")])
    await engine.close()
    assert counts[0] == [40, 0]
    assert sum(counts[1]) == 60
    assert counts[1][1] >= 32


# --- processes ---


async def test_closing_leaves_no_process(folder):
    engine = await start(folder)
    running = engine_processes(os.getpid())
    assert running
    await engine.close()
    wait_until_gone(running)


async def test_an_engine_process_that_is_killed_ends_every_call_with_a_typed_error(folder):
    engine = await start(folder)
    call = asyncio.create_task(engine.generate(np.array([5, 6]), SamplingParams(n=16, max_tokens=200)))
    await asyncio.sleep(0.05)
    for process in engine_processes(os.getpid()):
        process.kill()
    with pytest.raises(ActorDied, match="vLLM's engine process has died"):
        await asyncio.wait_for(call, 120)
    with pytest.raises(ActorDied):
        await asyncio.wait_for(engine.generate(np.array([5, 6]), greedy(4)), 120)
    with pytest.raises(ActorDied):
        await asyncio.wait_for(engine.update_weights(weights_of(tiny_llama(width=64, layers=2, heads=2), 1)), 30)
    await engine.close()


async def test_an_engine_process_that_dies_during_an_update_ends_it(folder):
    engine = await start(folder)
    for process in engine_processes(os.getpid()):
        process.suspend()
    update = asyncio.create_task(engine.update_weights(weights_of(tiny_llama(width=64, layers=2, heads=2), 1)))
    call = asyncio.create_task(engine.generate(np.array([5, 6]), greedy(4)))
    await asyncio.sleep(0.2)
    for process in engine_processes(os.getpid()):
        process.kill()
    for pending in (update, call):
        with pytest.raises(ActorDied, match="vLLM's engine process has died"):
            await asyncio.wait_for(pending, 60)
    await engine.close()


async def test_an_engine_found_dead_by_an_update_is_a_death_for_everybody(folder):
    """The update may hear of it before the operating system tells."""
    from vllm.v1.engine.exceptions import EngineDeadError

    engine = await start(folder)

    async def find_it_dead(*_):
        raise EngineDeadError

    engine._load = find_it_dead
    call = asyncio.create_task(engine.generate(np.array([5, 6]), SamplingParams(n=2, max_tokens=200)))
    await asyncio.sleep(0)
    update = asyncio.create_task(engine.update_weights(weights_of(tiny_llama(width=64, layers=2, heads=2), 1)))
    for pending in (update, call):
        with pytest.raises(ActorDied, match="vLLM's engine process has died"):
            await asyncio.wait_for(pending, 60)
    await engine.close()


async def test_an_engine_process_that_hangs_answers_no_ping(folder):
    engine = await start(folder)
    await asyncio.wait_for(engine.ping(), 60)
    processes = engine_processes(os.getpid())
    for process in processes:
        process.suspend()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.ping(), 0.5)
    for process in processes:
        process.resume()
    await asyncio.wait_for(engine.ping(), 60)
    await engine.close()


async def test_closing_during_an_update_ends_it(folder):
    engine, paused = await start(folder), asyncio.Event()

    async def never(*_):
        paused.set()
        await asyncio.sleep(600)

    engine._load = never
    update = asyncio.create_task(engine.update_weights(weights_of(tiny_llama(width=64, layers=2, heads=2), 1)))
    await paused.wait()
    await engine.close()
    with pytest.raises(RuntimeError, match="the engine was closed"):
        await asyncio.wait_for(update, 60)


async def test_giving_up_on_an_update_while_generation_pauses_does_not_stop_it(folder):
    engine, load, paused, go_on = await start(folder), None, asyncio.Event(), asyncio.Event()
    load = engine._load

    async def slow(*args):
        paused.set()
        await go_on.wait()
        await load(*args)

    engine._load = slow
    new = lively(tiny_llama(width=64, layers=2, heads=2), 2)
    update = asyncio.create_task(engine.update_weights(weights_of(new, 1)))
    await paused.wait()
    update.cancel()
    await asyncio.gather(update, return_exceptions=True)
    go_on.set()
    (completion,) = await engine.generate(np.array([5, 6]), greedy(4))
    await engine.close()
    assert completion.versions == ((1, 4),)
    assert completion.token_ids.tolist() == greedy_tokens(new, [5, 6], 4)


async def test_an_update_that_fails_half_way_stops_the_engine(folder):
    engine = await start(folder)

    async def fail(*_):
        raise OSError("half-way")

    engine._load = fail
    with pytest.raises(OSError, match="half-way"):
        await engine.update_weights(weights_of(tiny_llama(width=64, layers=2, heads=2), 1))
    with pytest.raises(RuntimeError, match="a weight update failed half-way"):
        await engine.generate(np.array([5, 6]), greedy(4))
    await engine.close()


async def test_cancelled_requests_are_aborted(folder):
    engine = await start(folder)
    call = asyncio.create_task(engine.generate(np.array([5, 6]), SamplingParams(n=16, max_tokens=200)))
    while engine._llm.output_processor.get_num_unfinished_requests() < 16:
        assert not call.done()
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert engine._llm.output_processor.get_num_unfinished_requests() == 0
    assert engine.stats().tokens == 0
    await engine.close()


async def test_a_model_split_over_two_processes_takes_new_weights_too(folder):
    engine, new = await start(folder, tensor_parallel_size=2), lively(tiny_llama(width=64, layers=2, heads=2), 2)
    running = engine_processes(os.getpid())
    assert len(running) > 2
    await engine.update_weights(weights_of(new, 1))
    (completion,) = await engine.generate(np.array([5, 6, 7]), greedy(8))
    await engine.close()
    wait_until_gone(running)
    assert completion.token_ids.tolist() == greedy_tokens(new, [5, 6, 7], 8)


def test_a_killed_generator_takes_its_engine_along(folder):
    script = (
        "import asyncio, sys; sys.path[:0] = ['tests/engines', '.']\n"
        "async def main():\n"
        "    from test_vllm_engine import start\n"
        f"    engine = await start({str(folder)!r})\n"
        "    print('started', flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    path = folder.parent / "generator.py"
    path.write_text(script)
    parent = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    try:
        assert any("started" in line for line in parent.stdout)
        running = engine_processes(parent.pid)
        assert running
        os.kill(parent.pid, signal.SIGKILL)
        wait_until_gone(running)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


class FatalTalk:
    """An episode of four turns. In the second one of the first episode that gets there, the engine's process dies."""

    killed = False

    def __init__(self, problem, seed):
        self._turns = 0

    async def begin(self):
        return Opening((Message("user", "begin:"),))

    async def reply(self, said):
        self._turns += 1
        if self._turns == 2 and not FatalTalk.killed:
            FatalTalk.killed = True
            for process in engine_processes(os.getpid()):
                process.kill()
        return Reply((Message("user", "go on"),), done=self._turns == 4)


class FatalTalks:
    def problems(self, split):
        return [Problem("begin:", "!")]

    def environment(self, problem, seed):
        return FatalTalk(problem, seed)


async def test_a_group_whose_engine_is_killed_in_mid_episode_is_played_again(folder, tiny_config):
    character_tokenizer().save_pretrained(folder)
    config, failures = tiny_config, Failures(tiny_config.recovery)
    config.model.path, config.task = str(folder), TaskConfig(f"{__name__}:FatalTalks")
    config.generator.engine, config.generator.max_sequences, config.environment.max_turn_tokens = "vllm", 8, 6
    config.rollout.max_completion_tokens = 64
    prompt = Prompt(3, Problem("begin:", "!"), np.array(character_tokenizer().encode("begin:")))
    async with launch_local(config, failures) as services:
        sampled = await sample_group(prompt, SamplingParams(n=3, max_tokens=64, seed=3), services, "rewards")
    model = lively(tiny_llama(width=64, layers=2, heads=2), 1)
    assert failures.restarts == {"generator": 1}
    for completion in sampled.completions:
        assert len(completion.turns) == 4
        expected = full_logprobs(model, prompt.token_ids, completion)[completion.sampled_places()]
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-4)


# --- settings ---


@pytest.mark.parametrize("settings", [{"no_such_setting": 1}, {"dtype": "float3"}])
async def test_a_setting_that_vllm_refuses_is_named(folder, settings):
    with pytest.raises(ConfigError, match=r"generator\.args: rejected by vLLM: .*(no_such_setting|float3)"):
        await start(folder, **settings)


# --- a pretrained model ---


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.15)])
async def test_smollm2_agrees_with_the_trainer_before_and_after_an_update(dtype, tolerance):
    config = RunConfig()
    config.model.path, config.model.dtype = str(smollm2.prepare(None)), dtype
    config.generator.engine, config.generator.max_sequences = "vllm", 8
    config.rollout.max_prompt_tokens, config.rollout.max_completion_tokens = 64, 24
    model = load_model(config.model, torch.float32, "cpu")
    model.generation_config.eos_token_id = None
    prompt = np.array(load_tokenizer(config.model).encode("The capital of France is"))
    params = SamplingParams(n=4, max_tokens=24)
    engine = await make_engine(config, "cpu", threads=1)
    try:
        for version in (0, 1):
            if version == 1:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.02)
                await engine.update_weights(WeightsWriter(model, getattr(torch, dtype)).write(1))
            for completion in await engine.generate(prompt, params):
                gap = np.abs(completion.logprobs - full_logprobs(model, prompt, completion))
                assert gap.mean() < tolerance
                assert completion.versions == ((version, len(completion.token_ids)),)
        if dtype == "float32":
            (best,) = await engine.generate(prompt, greedy(12))
            assert best.token_ids.tolist() == greedy_tokens(model, prompt, 12)[: len(best.token_ids)]
    finally:
        await engine.close()


# --- a whole run ---


def test_a_run_on_ray_trains_evaluates_and_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "scripts/train.py", "generator.engine=vllm", "trainer.max_steps=10"]
    evaluation = ["eval.prompts=8", "eval.every=5", "eval.num_cpus=0"]
    run = subprocess.Popen(
        [*command, *evaluation, f"hydra.run.dir={tmp_path}"],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    code, stdout, stderr = finish(run, timeout=300)
    assert code == 0, stdout + stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["max_policy_age_seen"]) == ("completed", 10, 1)
    evaluated = [evaluation["step"] for evaluation in summary["evaluations"]]
    assert (evaluated[0], evaluated[-1]) == (0, 10)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["mismatch/logprob_abs_diff"] < 1e-3  # sampled with the very weights of the step
    assert processes_of(run.pid) == []

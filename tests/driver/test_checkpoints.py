"""The real loop in one process with a real checkpointer: whatever stops a run, the next one continues it exactly."""

import asyncio
import dataclasses
import json
import shutil
import threading
from collections import Counter

import numpy as np
import pytest

from grpo.actors.checkpointer import Checkpointer
from grpo.actors.generator import Generator
from grpo.actors.marks import returns_payload
from grpo.actors.trainer import Trainer
from grpo.checkpoint import store
from grpo.checkpoint.resume import find_resume_point
from grpo.checkpoint.store import checkpoints
from grpo.config.algorithm import CorrectionConfig, DataloaderConfig, TaskConfig
from grpo.driver.loop import train_loop
from grpo.errors import CheckpointError, PayloadLost
from grpo.services.local import launch_local
from tests.driver.test_recovery import Executioner


class StoredTrainer(Trainer):
    """Its snapshots stay as they are, as copies in an object store do."""

    @returns_payload
    async def snapshot(self):
        state, version = await super().snapshot()
        return dataclasses.replace(state, buffer=state.buffer.copy()), version


class CountingGenerator(Generator):
    """Remembers the prompts of trainings that it was asked for."""

    def __init__(self, config):
        super().__init__(config)
        self.asked = Counter()

    async def generate(self, prompt, params):
        self.asked[prompt.serial] += params.seed < 1 << 60
        return await super().generate(prompt, params)


class Run:
    """One process of a run: its actors, a recorder on the run's folder, and what came of it.

    With a `prompt_disk` no step is trained while a checkpoint is being written, or an evaluation under way: all that
    are due are made.
    """

    def __init__(self, config, make_recorder, folder, prompt_disk):
        self.config, self.folder = config, folder
        self.trainer, self.generator = StoredTrainer(config), CountingGenerator(config)
        self.fakes = {"trainer": self.trainer, "generator": self.generator}
        self.shutdown = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        if prompt_disk:
            self.trainer.train_step = self._once_idle(self.trainer.train_step)
        self._make_recorder = make_recorder

    async def to_the_end(self, prepare=lambda run: None):
        """Train; goes on from where `config.resume` says. `prepare` is called when the actors are up."""
        point, self.warnings = find_resume_point(self.config, self.folder)
        recorder = self.recorder = self._make_recorder(self.config, self.folder)
        for event, then in (("taken", self._idle.clear), ("written", self._idle.set), ("failed", self._idle.set)):
            self.on_checkpoint(event, then)
        recorder.run_dir.cut(point.progress["files"] if point else {})
        recorder.run_dir.write("config.yaml", "")
        try:
            async with launch_local(self.config, recorder.failures, self.fakes) as self.services:
                prepare(self)
                await train_loop(self.services, self.config, recorder, self.shutdown, point)
                self.weights, _ = await self.trainer.push_weights()
        finally:
            self.summary = recorder.write_summary("over")
            recorder.run_dir.close()
        return self

    def on_checkpoint(self, event, then):
        """Have `then()` called when one is taken, written, or failed."""
        warn = getattr(self.recorder, f"checkpoint_{event}")

        def told(*args):
            warn(*args)
            then()

        setattr(self.recorder, f"checkpoint_{event}", told)

    def _once_idle(self, train_step):
        async def wait_and_train(batch):
            await self._idle.wait()
            while evaluating := [task for task in asyncio.all_tasks() if task.get_name().startswith("evaluation-")]:
                await asyncio.wait(evaluating)
            return await train_step(batch)

        return wait_and_train

    async def killed_after(self, step, moment="train_step"):
        """Cancelled as soon as the trainer has answered that call of that step; nothing is finished."""
        method, calls = getattr(self.trainer, moment), 0
        reached = asyncio.Event()

        async def counted(*args):
            nonlocal calls
            result = await method(*args)
            calls += 1
            if calls == step:
                reached.set()
            return result

        setattr(self.trainer, moment, counted)
        task = asyncio.create_task(self.to_the_end())
        done = asyncio.create_task(reached.wait())
        await asyncio.wait((task, done), return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def lines(self, name):
        return self.recorder.run_dir.read(name)

    @property
    def losses(self):
        return [line["loss"] for line in self.lines("metrics.jsonl")]

    @property
    def trained(self):
        """Ledger entries, (ticket, prompt), in the order in which they were trained on."""
        return [tuple(entry) for line in self.lines("ledger.jsonl") for entry in line.get("trained", ())]


@pytest.fixture(autouse=True)
async def without_debugging():
    """Debug mode notes the stack of every future: a third of the time of dozens of whole runs."""
    asyncio.get_running_loop().set_debug(False)


@pytest.fixture
def config(tiny_config, tmp_path):
    """One rollout at a time in step with the training: what is sampled and learned is exactly reproducible."""
    tiny_config.buffer.max_policy_age = 0
    tiny_config.rollout.concurrency = 1
    tiny_config.reward.workers = 1
    tiny_config.trainer.max_steps = 5
    tiny_config.trainer.lr_schedule = "linear"
    tiny_config.checkpoint.every = 1
    tiny_config.checkpoint.keep = 99
    tiny_config.checkpoint.dir = str(tmp_path / "run/checkpoints")
    return tiny_config


@pytest.fixture
def start(config, make_recorder, tmp_path):
    """A process of the run in `folder`, with other settings where they are given: start(eval={"prompts": 4})."""

    def start(resume=None, folder=tmp_path / "run", *, prompt_disk=True, **groups):
        groups.setdefault("checkpoint", {})
        changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
        of_folder = dataclasses.replace(changed["checkpoint"], dir=str(folder / "checkpoints"))
        config_here = dataclasses.replace(config, resume=resume, **changed | {"checkpoint": of_folder})
        return Run(config_here, make_recorder, folder, prompt_disk)

    return start


def keep_only(folder, step):
    """As if the process had ended before the checkpoints after that step were written."""
    for path in checkpoints(folder / "checkpoints"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


def assert_continued(run, undisturbed, *, exactly=True):
    """What the files of both processes say is what one undisturbed run would have left."""
    assert run.losses == (undisturbed.losses if exactly else pytest.approx(undisturbed.losses, abs=1e-5))
    if exactly:
        np.testing.assert_array_equal(run.weights.buffer, undisturbed.weights.buffer)
    assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(1, run.config.trainer.max_steps + 1))
    assert run.trained == undisturbed.trained
    assert run.summary["steps"] == run.config.trainer.max_steps
    assert run.summary["groups_trained"] == len(run.trained)
    dropped = sum(run.summary["groups_dropped"].values())
    assert run.summary["groups_admitted"] == run.summary["groups_trained"] + run.summary["groups_in_flight"] + dropped


# --- exactly ---


async def test_a_run_goes_on_exactly_from_each_of_its_checkpoints(start, tmp_path):
    undisturbed = await start(eval={"prompts": 4}).to_the_end()
    assert any(undisturbed.losses)
    assert undisturbed.trained == [(n, n) for n in range(10)]
    for step in range(1, 5):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"copy-{step}")
        keep_only(folder, step)
        resumed = await start("auto", folder, eval={"prompts": 4}).to_the_end()
        assert resumed.summary["resumed_at"] == [step]
        assert_continued(resumed, undisturbed)
        evaluations = [(e["step"], e["reward_mean"]) for e in resumed.summary["evaluations"]]
        assert evaluations == [(e["step"], e["reward_mean"]) for e in undisturbed.summary["evaluations"]]
        assert [step for step, _ in evaluations] == [0, 5]


async def test_a_run_that_filters_corrects_and_samples_by_difficulty_goes_on_exactly_too(start, config, tmp_path):
    config.task.args = {"train_size": 6, "held_out_size": 8}
    config.reward.functions = {"tests.fake_rewards:sometimes_equal": 1.0}
    config.dataloader = DataloaderConfig("difficulty", revisit_fraction=0.2)
    config.correction = CorrectionConfig("mask", max_ratio=5.0)
    config.filter.zero_variance, config.trainer.updates_per_batch = True, 2
    config.trainer.max_steps = 9
    undisturbed = await start().to_the_end()
    assert any(undisturbed.losses)
    assert undisturbed.summary["prompts"]["left_out_difficulty"] > 6
    assert undisturbed.summary["groups_dropped"]["zero_variance"] > 3
    for step in range(1, 9, 2):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"copy-{step}")
        keep_only(folder, step)
        resumed = await start("auto", folder).to_the_end()
        assert_continued(resumed, undisturbed)


@pytest.mark.parametrize("updates_per_batch", [1, 2])
async def test_episodes_go_on_exactly_too(start, config, tmp_path, updates_per_batch):
    """With a KL term and several updates too. All turns of a group are sampled together: tests/driver/test_loop.py."""
    config.task = TaskConfig("tests.fake_environments:WordsAtOnce")
    config.rollout.max_completion_tokens, config.environment.max_turn_tokens = 24, 1
    config.trainer.updates_per_batch, config.loss.beta = updates_per_batch, 0.05
    undisturbed = await start(eval={"prompts": 4}).to_the_end()
    assert any(undisturbed.losses)
    assert {line["episode/turns"] for line in undisturbed.lines("metrics.jsonl")} == {3.0}
    assert undisturbed.trained == [(n, n) for n in range(10)]
    for step in range(1, 5):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"copy-{step}")
        keep_only(folder, step)
        resumed = await start("auto", folder, eval={"prompts": 4}).to_the_end()
        assert_continued(resumed, undisturbed)
        played = [group for group in resumed.lines("rollouts.jsonl") if group["prompt_serial"] < 10]
        assert [group["completions"] for group in played] == [
            group["completions"] for group in undisturbed.lines("rollouts.jsonl") if group["prompt_serial"] < 10
        ]


@pytest.mark.parametrize(
    ("moment", "every"), [("train_step", 1), ("push_weights", 2), ("snapshot", 1), ("snapshot", 2)]
)
@pytest.mark.long
async def test_a_run_that_is_killed_goes_on_exactly(start, tmp_path, moment, every):
    """Twice, the second time in its first step."""
    settings = {"checkpoint": {"every": every}, "loss": {"beta": 0.05}}
    undisturbed = await start(folder=tmp_path / "undisturbed", **settings).to_the_end()
    await start(**settings).killed_after(4, moment)
    await start("auto", **settings).killed_after(1)
    resumed = await start("auto", **settings).to_the_end()
    assert resumed.summary["resumed_at"] == [2 if every == 2 else 3]
    assert_continued(resumed, undisturbed)


async def test_a_run_that_is_killed_before_its_first_checkpoint_begins_anew(start, tmp_path):
    undisturbed = await start(folder=tmp_path / "undisturbed").to_the_end()
    await start().killed_after(1)
    resumed = await start("auto").to_the_end()
    assert resumed.warnings == ["resume=auto: no run to resume was found; starting a new one"]
    assert_continued(resumed, undisturbed)


async def test_ctrl_c_leaves_a_checkpoint_of_the_last_step(start, tmp_path):
    undisturbed = await start(folder=tmp_path / "undisturbed").to_the_end()
    stopped = start(checkpoint={"every": 100})
    stopping, train_step = [], stopped.trainer.train_step

    async def until_the_third(batch):
        stopping.append(batch)
        if len(stopping) == 3:
            stopped.shutdown.set()
        return await train_step(batch)

    stopped.trainer.train_step = until_the_third
    await stopped.to_the_end()
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step_000003"]
    resumed = await start("auto").to_the_end()
    assert resumed.summary["resumed_at"] == [3]
    assert_continued(resumed, undisturbed)


async def test_in_a_new_folder_the_run_goes_on_with_the_step_after_the_checkpoint(start, tmp_path):
    """It was copied out of its run: what came before is told by nobody there, but it was trained on."""
    undisturbed = await start().to_the_end()
    copy = shutil.copytree(tmp_path / "run/checkpoints/step_000003", tmp_path / "elsewhere/step_000003")
    resumed = await start(str(copy), tmp_path / "new").to_the_end()
    assert [line["step"] for line in resumed.lines("metrics.jsonl")] == [4, 5]
    assert resumed.losses == undisturbed.losses[3:]
    np.testing.assert_array_equal(resumed.weights.buffer, undisturbed.weights.buffer)
    assert resumed.trained == undisturbed.trained[6:]
    assert (resumed.summary["steps"], resumed.summary["groups_trained"]) == (5, 10)
    assert [path.name for path in checkpoints(tmp_path / "new/checkpoints")] == ["step_000005", "step_000004"]


async def test_a_run_stopped_after_its_last_step_only_writes_its_summary(start, tmp_path):
    undisturbed = await start(eval={"prompts": 4}).to_the_end()
    (tmp_path / "run/summary.json").unlink()
    resumed = await start("auto", eval={"prompts": 4}).to_the_end()
    assert_continued(resumed, undisturbed)
    assert resumed.generator.asked.total() <= 1  # what the next step would need
    assert [e["step"] for e in resumed.summary["evaluations"]] == [0, 5]


async def test_a_line_that_was_lost_on_a_full_disk_does_not_shift_the_steps(start, tmp_path):
    undisturbed = await start(folder=tmp_path / "undisturbed").to_the_end()
    first = start()
    await first.to_the_end()
    keep_only(tmp_path / "run", 3)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/metrics.jsonl").write_text("".join(lines[:2]))
    resumed = await start("auto").to_the_end()
    assert [line["step"] for line in resumed.lines("metrics.jsonl")] == [1, 2, 4, 5]
    np.testing.assert_array_equal(resumed.weights.buffer, undisturbed.weights.buffer)


# --- many rollouts at once ---


@pytest.fixture
def ahead(config):
    """Rollouts run two versions ahead, so groups lie in the replay buffer when a checkpoint is taken."""
    config.buffer.max_policy_age = 2
    config.rollout.concurrency = 16
    config.generator.engine, config.generator.args = "simulated", {"latency_s": 0.001, "latency_sigma": 1.5}
    config.trainer.groups_per_step, config.trainer.max_steps = 4, 12
    config.checkpoint.every = 2
    config.checkpoint.keep = 2
    return config


async def test_finished_groups_are_in_the_checkpoint_and_not_made_again(ahead, start, tmp_path):
    for stop in (3, 4, 7):
        folder = tmp_path / f"run-{stop}"
        await start(folder=folder).killed_after(stop)
        [newest, *_] = checkpoints(folder / "checkpoints")
        buffered = {record["prompt"]["serial"] for record in groups_in(newest)}
        ledger = json.loads((newest / "progress.json").read_text())["ledger"]
        begun = {prompt for _, prompt in ledger["outstanding"] if prompt is not None}
        resumed = await start("auto", folder).to_the_end()

        again = next(line for line in resumed.lines("ledger.jsonl") if line.get("reason") == "resumed")["requeued"]
        assert {prompt for _, prompt in again} - {None} == begun - buffered
        assert resumed.summary["groups_requeued"] == {"resumed": len(again)}
        assert not buffered & resumed.generator.asked.keys()
        assert set(resumed.generator.asked.values()) == {1}
        tickets, prompts = zip(*resumed.trained, strict=True)
        assert list(tickets) == list(range(48))  # in the order of admission, none lost, none twice
        assert set(prompts) == set(range(48))
        assert resumed.summary["max_policy_age_seen"] <= 2
        assert [line["step"] for line in resumed.lines("metrics.jsonl")] == list(range(1, 13))


def groups_in(path):
    return [{"prompt": {"serial": group.prompt.serial}} for _, group in store.load_groups(path)]


async def test_resumed_time_and_again_it_trains_on_what_an_undisturbed_run_does(ahead, start, tmp_path):
    undisturbed = await start(folder=tmp_path / "undisturbed").to_the_end()
    await start().killed_after(4)
    for _ in range(3):
        await start("auto").killed_after(4)
    resumed = await start("auto").to_the_end()
    assert Counter(prompt for _, prompt in resumed.trained) == Counter(prompt for _, prompt in undisturbed.trained)
    assert resumed.summary["resumed_at"] == [2, 4, 6, 8]


# --- disks and processes that fail ---


class FullDisk(Checkpointer):
    """Writes only the checkpoints of some steps."""

    def __init__(self, config, folder, room_for=(), error=CheckpointError):
        super().__init__(config, folder)
        self.room_for, self.tried, self._error = room_for, [], error

    async def save(self, step, *args):
        self.tried.append(step)
        if step not in self.room_for:
            raise self._error(f"no space left for step {step}")
        return await super().save(step, *args)


@pytest.mark.parametrize("error", [CheckpointError, PayloadLost])
async def test_what_cannot_be_written_is_a_warning_and_the_checkpoint_before_stays_usable(start, tmp_path, error):
    undisturbed = await start(folder=tmp_path / "undisturbed").to_the_end()
    crowded = start()
    crowded.fakes["checkpointer"] = FullDisk(crowded.config, crowded.config.checkpoint.dir, room_for=(2,), error=error)
    await crowded.to_the_end()
    assert_continued(crowded, undisturbed)
    assert crowded.summary["checkpoints"] == {"written": 1, "failed": 4, "skipped": 0}
    assert "warning: checkpoint at step 5 failed: no space left for step 5" in shown(crowded)
    resumed = await start("auto").to_the_end()
    assert resumed.summary["resumed_at"] == [2]
    assert_continued(resumed, undisturbed)


async def test_one_that_failed_is_tried_again_when_the_run_is_stopped(start):
    stopped = start()
    disk = FullDisk(stopped.config, stopped.config.checkpoint.dir)
    stopped.fakes["checkpointer"] = disk

    def room_again():
        disk.room_for = range(100)
        stopped.shutdown.set()

    await stopped.to_the_end(lambda run: run.on_checkpoint("failed", room_again))
    assert disk.tried == [1, 1]
    assert [path.name for path in checkpoints(stopped.folder / "checkpoints")] == ["step_000001"]
    assert stopped.summary["checkpoints"] == {"written": 1, "failed": 1, "skipped": 0}


def shown(run):
    return run.recorder._display._console.file.getvalue()


class SlowDisk(Checkpointer):
    """Begins to write a checkpoint when `until(step)` returns."""

    def __init__(self, config, folder, until):
        super().__init__(config, folder)
        self._until = until

    async def save(self, step, *args):
        await self._until(step)
        return await super().save(step, *args)


@pytest.mark.parametrize("max_steps", [4, 5])
async def test_one_that_is_due_while_another_is_written_is_skipped_and_counted_but_never_the_last(
    start, tmp_path, max_steps
):
    slow = start(prompt_disk=False, trainer={"max_steps": max_steps})
    trained, last = [], asyncio.Event()
    train_step = slow.trainer.train_step

    async def counted(batch):
        trained.append(batch)
        if len(trained) == max_steps:
            last.set()
        return await train_step(batch)

    async def until(step):
        if step == 1:
            await last.wait()

    slow.trainer.train_step = counted
    slow.fakes["checkpointer"] = SlowDisk(slow.config, slow.config.checkpoint.dir, until)
    await slow.to_the_end()
    names = [path.name for path in checkpoints(tmp_path / "run/checkpoints")]
    assert names == [f"step_{max_steps:06d}", "step_000001"]
    assert slow.summary["checkpoints"] == {"written": 2, "failed": 0, "skipped": max_steps - 2}
    assert shown(slow).count("is still being written; raise checkpoint.every") == max_steps - 2
    assert f"skipped checkpoint at step {max_steps}" not in shown(slow)


@pytest.mark.parametrize("when", ["before", "lost answer", "after"])
async def test_a_checkpointer_that_is_killed_is_replaced_and_the_checkpoint_written(start, tmp_path, when):
    undisturbed = await start(folder=tmp_path / "undisturbed").to_the_end()
    executioners = []
    disturbed = await start().to_the_end(
        lambda run: executioners.append(Executioner(run.services, "checkpointer", "save", 2, when))
    )
    assert executioners[0].done.is_set()
    assert disturbed.recorder.failures.restarts == {"checkpointer": 1}
    assert_continued(disturbed, undisturbed)
    assert disturbed.summary["checkpoints"]["failed"] == 0
    [newest, *_] = checkpoints(tmp_path / "run/checkpoints")
    assert newest.name == "step_000005"
    for path in checkpoints(tmp_path / "run/checkpoints"):
        store.verify(path)


async def test_a_checkpointer_killed_while_it_writes_leaves_no_half_checkpoint(start, tmp_path, monkeypatch):
    writing, dead, real, begun = asyncio.Event(), threading.Event(), store.save_checkpoint, []
    loop = asyncio.get_running_loop()

    def killed_while_writing(folder, step, *args):
        begun.append(step)
        if len(begun) == 1:
            (folder / f".step_{step:06d}.unfinished").mkdir(parents=True)
            loop.call_soon_threadsafe(writing.set)
            dead.wait()
            raise RuntimeError("nobody hears of it")
        return real(folder, step, *args)

    monkeypatch.setattr(store, "save_checkpoint", killed_while_writing)

    async def kill(run):
        await writing.wait()
        run.services.checkpointer.service.replicas[0].endpoint.kill()
        dead.set()

    killing = []
    disturbed = await start(checkpoint={"every": 100}).to_the_end(
        lambda run: killing.append(asyncio.create_task(kill(run)))
    )
    await killing[0]
    assert begun == [5, 5]
    assert disturbed.recorder.failures.restarts == {"checkpointer": 1}
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000005"]
    store.verify(tmp_path / "run/checkpoints/step_000005")


# --- evaluations ---


@pytest.mark.parametrize("replicas", [0, 1], ids=["the training's generators", "an evaluator"])
async def test_evaluations_are_neither_repeated_nor_lost(start, tmp_path, replicas):
    settings = {"eval": {"prompts": 4, "every": 2, "replicas": replicas}, "checkpoint": {"every": 2}}
    undisturbed = await start(folder=tmp_path / "undisturbed", **settings).to_the_end()
    whole = {e["step"]: e["reward_mean"] for e in undisturbed.summary["evaluations"]}
    await start(**settings).killed_after(4)
    resumed = await start("auto", **settings).to_the_end()
    evaluations = {e["step"]: e["reward_mean"] for e in resumed.summary["evaluations"]}
    assert evaluations == whole
    assert list(evaluations) == [e["step"] for e in resumed.summary["evaluations"]] == [0, 2, 4, 5]
    # Rollouts that share the generators with an evaluation are decoded in other batches, which differ by rounding.
    assert_continued(resumed, undisturbed, exactly=replicas > 0)

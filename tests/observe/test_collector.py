"""The collector: everybody is asked, nobody is waited for without end, and one that died is no error."""

import asyncio
import json

import pytest

from grpo.errors import ActorDied
from grpo.observe import collector
from grpo.observe.collector import collecting
from grpo.observe.run_dir import RunDirectory
from grpo.observe.timeline import Timeline
from grpo.telemetry.metrics import MetricSet
from grpo.telemetry.recording import Recording, context_for, measure, on_track, span
from grpo.utils.aio import Signal


class Actor:
    """A process with spans of its own."""

    def __init__(self, name):
        self.name, self.recording, self.asked, self.dead = name, Recording(), 0, False

    async def work(self, name):
        async def body():
            with span(name):
                await asyncio.sleep(0)

        await asyncio.get_running_loop().create_task(body(), context=context_for(self.recording))

    async def drain(self, *, keep_recording):
        self.asked += 1
        if self.dead:
            raise ActorDied(f"{self.name} died")
        return self.recording.drain(keep_recording=keep_recording)


class Hung(Actor):
    async def drain(self, *, keep_recording):
        if not keep_recording:
            await asyncio.get_running_loop().create_future()
        return await super().drain(keep_recording=keep_recording)


class Actors:
    def __init__(self, *actors):
        self.actors = actors

    def processes(self):
        return self.actors


@pytest.fixture
def run_dir(tmp_path):
    run_dir = RunDirectory(tmp_path)
    yield run_dir
    run_dir.close()


def names(run_dir):
    run_dir.sizes().result()
    text = (run_dir.path / "timeline.json").read_text()
    return sorted(event["name"] for event in json.loads(text) if event["ph"] == "X")


async def test_it_brings_together_what_the_driver_and_the_actors_did(run_dir):
    actors = Actor("generator-0"), Actor("trainer")
    async with collecting(Actors(*actors), Signal(), MetricSet(), Timeline(run_dir, 0.0, 1.0, print)):
        on_track("training")
        with span("a wait", "wait"):
            await actors[0].work("decode")
            await actors[1].work("forward")
    assert names(run_dir) == ["a wait", "decode", "forward"]
    assert not actors[0].recording.on


async def test_it_asks_after_a_step_and_not_all_the_time(run_dir, monkeypatch):
    monkeypatch.setattr(collector, "_MIN_INTERVAL_S", 0.0)
    actor, trained = Actor("trainer"), Signal()
    async with collecting(Actors(actor), trained, MetricSet(), Timeline(run_dir, 0.0, 1.0, print)):
        assert actor.asked == 1
        for steps in (1, 2):
            for _ in range(20):
                await asyncio.sleep(0)
            assert actor.asked == steps
            trained.notify()
        for _ in range(20):
            await asyncio.sleep(0)
        assert actor.asked == 3


async def test_one_that_died_is_no_error(run_dir):
    alive, dead = Actor("generator-0"), Actor("generator-1")
    async with collecting(Actors(dead, alive), Signal(), MetricSet(), Timeline(run_dir, 0.0, 1.0, print)):
        await alive.work("decode")
        dead.dead = True
    assert names(run_dir) == ["decode"]


async def test_one_that_hangs_does_not_hold_up_the_end(run_dir, monkeypatch, caplog):
    monkeypatch.setattr(collector, "_LAST_TIMEOUT_S", 0.02)
    async with collecting(Actors(Hung("trainer")), Signal(), MetricSet(), Timeline(run_dir, 0.0, 1.0, print)):
        pass
    assert "the end of the timeline is missing" in caplog.text


async def test_when_the_file_is_full_nobody_records_any_more(run_dir, monkeypatch):
    monkeypatch.setattr(collector, "_MIN_INTERVAL_S", 0.0)
    actor, trained = Actor("trainer"), Signal()
    async with collecting(Actors(actor), trained, MetricSet(), Timeline(run_dir, 0.0, 1e-6, print)):
        await actor.work("forward")
        for _ in range(2):
            for _ in range(20):
                await asyncio.sleep(0)
            trained.notify()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not actor.recording.on


async def test_errors_of_the_run_pass_through(run_dir):
    with pytest.raises(ValueError, match="broken"):
        async with collecting(Actors(Actor("trainer")), Signal(), MetricSet(), Timeline(run_dir, 0.0, 1.0, print)):
            raise ValueError("broken")


async def test_metrics_of_all_processes_become_one(run_dir):
    async def work(value):
        measure("generator/queue_s", value)

    metrics, actors = MetricSet(), (Actor("generator-0"), Actor("generator-1"))
    async with collecting(Actors(*actors), Signal(), metrics, None):
        for actor, value in zip(actors, (1.0, 2.0), strict=True):
            await asyncio.get_running_loop().create_task(work(value), context=context_for(actor.recording))
        measure("generator/queue_s", 6.0)
        with span("nobody wants spans"):
            pass
    assert metrics.drain() == {"generator/queue_s/mean": 3.0}
    assert not (run_dir.path / "timeline.json").exists()


async def test_warnings_of_actors_bear_their_names(run_dir):
    actor, shown = Actor("environment-1"), []
    async with collecting(Actors(actor), Signal(), MetricSet(), None, shown.append):
        actor.recording.warn("the disk is full")
    assert shown == ["environment-1: the disk is full"]

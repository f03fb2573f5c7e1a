"""Spans: where they go, which lane they take, and what is left of them when nobody records."""

import asyncio

import pytest

from grpo.telemetry.recording import (
    Recording,
    context_for,
    measure,
    no_spans,
    note,
    on_track,
    record_in,
    span,
    stop_recording,
    warn,
)
from grpo.utils.aio import gather_or_cancel
from grpo.utils.torch_utils import ComputeThread


@pytest.fixture
def spans():
    spans = Recording(on=True)
    record_in(spans)
    yield spans
    stop_recording()  # the context of a fixture is that of all tests


def recorded(spans):
    return [(found.track, found.lane, found.name) for found in spans.drain(keep_recording=True).spans]


async def test_a_span_has_its_times_kind_and_arguments(spans):
    with span("decode", "busy", rows=3):
        pass
    (found,) = spans.drain(keep_recording=True).spans
    assert (found.name, found.kind, found.args, found.failed) == ("decode", "busy", {"rows": 3}, False)
    assert found.begin_s <= found.end_s


async def test_what_is_known_only_later_is_added_to_the_span_around(spans):
    with span("group", ticket=3):
        with span("generate"):
            pass
        note(lengths=(5, 7))
    note(lengths=())  # around nothing
    group = next(each for each in spans.drain(keep_recording=True).spans if each.name == "group")
    assert group.args == {"ticket": 3, "lengths": (5, 7)}


async def test_nothing_is_recorded_outside_of_any_recording():
    with span("decode") as nothing:
        assert nothing is None


async def test_nothing_is_recorded_while_it_is_off(spans):
    spans.drain(keep_recording=False)
    with span("decode"):
        pass
    assert recorded(spans) == []
    with span("prefill"):
        pass
    assert recorded(spans) == [("", 0, "prefill")]


async def test_an_error_passes_through_and_is_noted(spans):
    with pytest.raises(ValueError, match="broken"), span("decode"):
        raise ValueError("broken")
    (found,) = spans.drain(keep_recording=True).spans
    assert found.failed


async def test_one_inside_another_shares_its_lane(spans):
    with span("step"), span("forward"):
        pass
    assert recorded(spans) == [("", 0, "forward"), ("", 0, "step")]


async def test_those_side_by_side_have_lanes_of_their_own_and_give_them_back(spans):
    async def work(name):
        with span(name):
            await asyncio.sleep(0)

    await gather_or_cancel(work("a"), work("b"))
    await work("c")
    assert recorded(spans) == [("", 0, "a"), ("", 1, "b"), ("", 0, "c")]


async def test_of_two_inside_another_the_second_has_a_lane_of_its_own(spans):
    async def work(name):
        with span(name):
            await asyncio.sleep(0)

    with span("group"):
        await gather_or_cancel(work("score"), work("reference"))
        await work("add")
    assert recorded(spans) == [("", 0, "score"), ("", 1, "reference"), ("", 0, "add"), ("", 0, "group")]


async def test_tracks_have_lanes_of_their_own(spans):
    async def coroutine(name):
        on_track(name)
        with span("wait"):
            await asyncio.sleep(0)

    await gather_or_cancel(coroutine("rollouts-0"), coroutine("rollouts-1"))
    assert recorded(spans) == [("rollouts-0", 0, "wait"), ("rollouts-1", 0, "wait")]


async def test_a_task_may_leave_none(spans):
    async def answer():
        stop_recording()
        with span("wait"):
            await asyncio.sleep(0)

    await gather_or_cancel(answer())
    with span("evaluation"):
        pass
    assert recorded(spans) == [("", 0, "evaluation")]


async def test_a_block_may_leave_no_spans_but_its_metrics(spans):
    async def play():
        with span("turn"):
            await asyncio.sleep(0)
        measure("episode/tools", 2)

    with no_spans():
        await gather_or_cancel(play(), play())
        with context_for(spans).run(span, "of another actor"):
            pass
    with span("episodes"):
        pass
    batch = spans.drain(keep_recording=True)
    assert [each.name for each in batch.spans] == ["of another actor", "episodes"]
    assert batch.metrics.drain() == {"episode/tools/mean": 2.0}


async def test_work_for_somebody_else_adds_to_the_actors_own(spans):
    others = Recording(on=True)

    async def serve():
        with span("decode"):
            await asyncio.sleep(0)

    on_track("rollouts-0")
    with span("generator.generate"):
        await asyncio.get_running_loop().create_task(serve(), context=context_for(others))
    assert recorded(others) == [("", 0, "decode")]
    assert recorded(spans) == [("rollouts-0", 0, "generator.generate")]


async def test_a_compute_thread_records_for_who_asked(spans):
    thread = ComputeThread("test")

    def work():
        with span("forward"):
            pass

    with span("train_step"):
        await thread.run(work)
    thread.close()
    assert recorded(spans) == [("", 0, "forward"), ("", 0, "train_step")]


async def test_what_there_is_no_room_for_is_counted(spans, monkeypatch):
    monkeypatch.setattr("grpo.telemetry.recording._MAX_SPANS", 2)
    for _ in range(5):
        with span("decode"):
            pass
    drain = spans.drain(keep_recording=True)
    assert (len(drain.spans), drain.lost) == (2, 3)
    assert spans.drain(keep_recording=True).lost == 0


async def test_metrics_are_kept_whether_spans_are_wanted_or_not(spans):
    spans.drain(keep_recording=False)
    measure("reward/score_s", 1.0)
    measure("reward/score_s", 3.0)
    assert spans.drain(keep_recording=False).metrics.drain() == {"reward/score_s/mean": 2.0}
    assert spans.drain(keep_recording=False).metrics.drain() == {}


async def test_a_metric_outside_of_any_recording_goes_nowhere():
    measure("reward/score_s", 1.0)


async def test_a_warning_is_given_once(spans):
    for message in ("the disk is full", "the disk is slow", "the disk is full"):
        warn(message)
    assert spans.drain(keep_recording=False).warnings == ("the disk is full", "the disk is slow")
    warn("the disk is full")
    assert spans.drain(keep_recording=False).warnings == ()

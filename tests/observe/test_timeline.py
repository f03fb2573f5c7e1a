"""timeline.json: Chrome's trace format, with the clocks of all processes brought to the driver's."""

import json

import pytest

from grpo.observe.run_dir import RunDirectory
from grpo.observe.timeline import Clocks, Timeline
from grpo.telemetry.metrics import MetricSet
from grpo.telemetry.recording import Span, TelemetryBatch


def make_span(name="decode", begin_s=1.0, end_s=2.0, *, track="", lane=0, kind="busy", failed=False, **args):
    return Span(track, lane, name, kind, begin_s, end_s, failed, args)


@pytest.fixture
def told():
    return []


@pytest.fixture
def write(tmp_path, told):
    """Writes harvests, given as (process, spans), as a run would; returns the text of the file."""

    def write(*harvests, close=True, zero_s=0.0, most_mb=1.0, lost=0):
        run_dir = RunDirectory(tmp_path)
        timeline = Timeline(run_dir, zero_s, most_mb, told.append)
        for process, spans in harvests:
            timeline.add(process, TelemetryBatch(list(spans), MetricSet(), 0.0, lost))
        if close:
            timeline.close()
        run_dir.close()
        file = tmp_path / "timeline.json"
        return file.read_text() if file.exists() else None

    return write


def of_kind(text, phase):
    return [event for event in json.loads(text) if event["ph"] == phase]


def test_a_span_becomes_an_event_in_microseconds_since_the_start(write):
    text = write(("generator-0", [make_span("decode", 10.5, 10.75, rows=3)]), zero_s=10.0)
    (event,) = of_kind(text, "X")
    assert (event["name"], event["cat"], event["args"]) == ("decode", "busy", {"rows": 3})
    assert (event["ts"], event["dur"]) == (500_000.0, 250_000.0)


def test_tracks_are_named_once_and_lanes_are_tracks_of_their_own(write):
    text = write(
        ("driver", [make_span(track="rollouts-0"), make_span(track="rollouts-0", lane=1)]),
        ("driver", [make_span(track="rollouts-0")]),
        ("generator-0", [make_span()]),
    )
    named = [event for event in of_kind(text, "M") if event["name"] == "thread_name"]
    assert [event["args"]["name"] for event in named] == ["rollouts-0", "rollouts-0 (2)", "generator-0"]
    places = [(event["pid"], event["tid"]) for event in of_kind(text, "X")]
    assert places[0] == places[2]
    assert len(set(places)) == 3
    assert [pid for pid, _ in places[:3]] == [0, 0, 0]


def test_arrows_lead_from_a_group_to_the_train_step_that_took_it(write):
    text = write(
        ("driver", [make_span("group", 1.0, 2.0, track="rollouts-0", ticket=7)]),
        ("driver", [make_span("train_step", 3.0, 4.0, track="training", tickets=[7, 8])]),
    )
    (start,) = of_kind(text, "s")
    assert (start["id"], start["ts"]) == (7, 1e6)
    assert [(end["id"], end["ts"]) for end in of_kind(text, "f")] == [(7, 3e6), (8, 3e6)]


def test_no_arrow_leaves_a_group_that_failed(write):
    text = write(("driver", [make_span("group", failed=True, ticket=7)]))
    assert of_kind(text, "s") == []
    assert of_kind(text, "X")[0]["args"] == {"ticket": 7, "failed": True}


def test_without_its_end_it_still_can_be_read(write):
    text = write(("driver", [make_span(), make_span()]), ("driver", [make_span()]), close=False)
    assert len([event for event in json.loads(text + "]") if event["ph"] == "X"]) == 3


def test_a_resumed_run_goes_on_with_the_file(write):
    write(("driver", [make_span(track="training")]), close=False)
    text = write(("driver", [make_span(track="training")]))
    events = of_kind(text, "X")
    assert len(events) == 2
    assert events[0]["tid"] == events[1]["tid"]


def test_it_does_not_grow_without_end(write, told):
    text = write(*(("driver", [make_span()] * 10) for _ in range(100)), most_mb=0.01)
    assert 10_000 <= len(text) < 13_000
    assert told == ["timeline.json ends here: it has reached its size limit (observe.timeline_mb)"]
    assert of_kind(text, "X")


def test_what_is_missing_is_told(write, told):
    write(("driver", [make_span()]), ("trainer", [make_span()]), lost=3)
    assert told == ["timeline.json lacks 6 spans: more were recorded between two steps than are kept"]


def test_a_run_in_which_nothing_was_recorded_leaves_none(write):
    assert write() is None


def test_processes_of_one_machine_share_their_clock():
    clocks = Clocks()
    clocks.answered("generator-0", asked_s=100.0, its_s=100.009, answered_s=100.010)
    assert clocks.offset_s("generator-0") == 0.0


def test_the_clock_of_another_machine_is_found_within_half_the_round_trip():
    clocks, ahead_s = Clocks(), 5000.0
    for asked_s, there_s, back_s in ((10.0, 0.02, 0.08), (20.0, 0.001, 0.002), (30.0, 0.3, 0.1)):
        clocks.answered("generator-0", asked_s, asked_s + there_s + ahead_s, asked_s + there_s + back_s)
    assert clocks.offset_s("generator-0") == pytest.approx(-ahead_s, abs=0.0015)
    assert clocks.offset_s("unheard of") == 0.0

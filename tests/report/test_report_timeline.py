"""From a trace to the switches of the event loop."""

import json

import pytest

from grpo.report.timeline import parse, read_timeline
from tests.report.made_runs import events


@pytest.fixture
def read(tmp_path):
    def write_and_read(text, **limits):
        (tmp_path / "timeline.json").write_text(text)
        return read_timeline(tmp_path / "timeline.json", **limits)

    return write_and_read


def told(timeline, switch):
    begin, end, track, ended, began, whole = switch
    names = [timeline["names"][timeline["spans"][number][3]] for number in (ended, began)]
    return (timeline["tracks"][track]["name"], *names, begin, end, whole)


def test_every_form_of_the_file_is_read(read):
    made = events()
    forms = [json.dumps(made), json.dumps({"displayTimeUnit": "ms", "traceEvents": made}), json.dumps(made)[:-1]]
    forms.append("[\n" + ",\n".join(json.dumps(event) for event in made) + ',\n{"ph": "X", "na')
    assert all(list(parse(form)) == made for form in forms)


@pytest.mark.parametrize("text", ["", "[", "[]", "[\n", '{"traceEvents": []}', "nonsense"])
def test_a_file_with_nothing_in_it_is_no_timeline(read, text):
    assert read(text) is None


def test_no_file_is_no_timeline(tmp_path):
    assert read_timeline(tmp_path / "timeline.json") is None


def test_tracks_stand_in_order(read):
    tracks = [(track["process"], track["name"]) for track in read(json.dumps(events()))["tracks"]]
    driver = ["training", "rollouts-0", "rollouts-0 (2)", "rollouts-1"]
    assert tracks == [*(("driver", name) for name in driver), ("trainer", "trainer"), ("generator", "generator")]


def test_a_coroutine_runs_between_two_waits(read):
    timeline = read(json.dumps(events(groups=1)))
    switches = [told(timeline, switch) for switch in timeline["switches"]]
    assert switches == [
        ("rollouts-0", "ticket", "generator.generate", 90, 100, True),
        ("rollouts-1", "ticket", "generator.generate", 100, 110, True),
        ("rollouts-0", "generator.generate", "reward.score", 500, 502, True),
        ("rollouts-1", "generator.generate", "reward.score", 510, 512, True),
    ]


def test_waits_side_by_side_are_one_wait(read):
    timeline = read(json.dumps(events(groups=2)))
    after = [told(timeline, switch) for switch in timeline["switches"] if switch[0] == 803]
    assert after == [("rollouts-0", "reference.score", "ticket", 803, 1000, False)]  # others ran meanwhile


def test_a_stage_without_a_wait_counts_as_one(read):
    made = [event for event in events(groups=2) if event["name"] != "trainer.train_step"]
    timeline = read(json.dumps(made))
    assert ("training", "train_step", "train_step", 995, 1900, False) in [
        told(timeline, s) for s in timeline["switches"]
    ]


def test_only_the_first_spans_are_kept(read):
    whole, cut = read(json.dumps(events())), read(json.dumps(events()), most=10)
    assert (len(cut["spans"]), cut["spans_in_all"]) == (10, len(whole["spans"]))
    assert cut["spans"] == [
        [*span[:3], cut["names"].index(whole["names"][span[3]]), *span[4:]] for span in whole["spans"][:10]
    ]
    assert cut["end"] < whole["end"]


def test_a_later_part_is_kept_instead(read):
    late = read(json.dumps(events()), from_s=0.002)
    assert 0 < len(late["spans"]) < late["spans_in_all"]
    assert all(begin + length >= 2000 for _, begin, length, *_ in late["spans"])
    assert read(json.dumps(events()), most=3, from_s=9.0)["spans"]  # after the end: the last ones

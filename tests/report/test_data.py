"""Reading a run's folder: whole, cut off, or none at all."""

import json

import pytest

from grpo.errors import ReportError
from grpo.observe.renamed_metrics import with_old_names
from grpo.report.data import differing, figures, read_jsonl, read_rollouts, read_run
from grpo.report.page import columns, page, write_report
from tests.report.made_runs import NASTY, make_run, write_jsonl


def test_a_whole_run(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert run.config["rollout.concurrency"] == 4
    assert [each["step"] for each in run.evaluations] == [0, 12]
    assert [(d["actor"], d["at_s"], d["step"], d["back_s"], d["next_step_s"]) for d in run.deaths] == [
        ("generator", 14.5, 5, 2.0, 0.5),
        ("reward-1", 14.75, 5, None, 0.25),
    ]
    assert run.resumed_at == [2]
    found = figures(run)
    assert (found["status"], found["restarts"], found["tokens_per_s"]) == ("failed", 2, 400.0)
    assert found["groups_per_s"] == pytest.approx(12 * 4 / (12 * 0.7))
    assert not run.notes


def test_a_run_without_a_summary_is_read_from_its_steps(tmp_path):
    run = read_run(make_run(tmp_path / "run", summary=False))
    found = figures(run)
    assert "still running" in found["status"]
    assert (found["steps"], found["eval_first"], found["restarts"]) == (12, 0.3, 1)
    assert found["reward_last"] == pytest.approx(12 / 20)
    assert [each["step"] for each in run.evaluations] == [1, 10]


def test_a_broken_last_line_is_passed_over(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "rew')
    run = read_run(folder)
    assert run.steps[-1]["step"] == 12
    assert run.notes == ["metrics.jsonl: 1 broken line was skipped."]


def test_runs_of_earlier_versions_are_read_under_the_new_names(tmp_path):
    folder = make_run(tmp_path / "run")
    lines = read_jsonl(folder / "metrics.jsonl", [])
    expected = read_run(folder).steps
    write_jsonl(folder / "metrics.jsonl", [with_old_names(line) for line in lines])
    assert read_run(folder).steps == expected
    old = {"mismatch/logprob_abs_diff": "mismatch/behavior_abs"}
    write_jsonl(folder / "metrics.jsonl", [{old.get(k, k): v for k, v in line.items()} for line in lines])
    assert read_run(folder).steps == expected
    assert "mismatch/behavior_abs" not in columns(read_run(folder).steps)


def test_other_broken_files_are_notes(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "summary.json").write_text("{")
    (folder / "config.yaml").write_text("a: [")
    assert sorted(read_run(folder).notes) == ["config.yaml can't be read.", "summary.json can't be read."]


def test_line_separators_in_a_text_end_no_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n")
    assert read_jsonl(file, []) == [{"text": "a\u2028b\u0085c"}]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no metrics.jsonl"),
        (lambda folder: make_run(folder, steps=0), "no step"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(tmp_path, make, said):
    make(tmp_path / "run")
    with pytest.raises(ReportError, match=said) as caught:
        write_report([tmp_path / "run"])
    assert "\n" not in str(caught.value)


def test_too_many_groups_are_thinned_evenly(tmp_path):
    write_jsonl(tmp_path / "rollouts.jsonl", [{"step": number} for number in range(100)])
    notes = []
    kept = [group["step"] for group in read_rollouts(tmp_path, notes, most=10)]
    assert kept == list(range(9, 100, 10))
    assert "10 of 100" in notes[0]


def test_tokens_have_a_room_of_their_own(tmp_path):
    write_jsonl(
        tmp_path / "rollouts.jsonl", [{"step": number, "tokens": [[["x" * 100, 0.0, 1]]]} for number in range(40)]
    )
    notes = []
    groups = read_rollouts(tmp_path, notes, most_bytes=1200)
    assert [group["step"] for group in groups] == list(range(40))
    assert [group["step"] for group in groups if "tokens" in group] == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
    assert notes == ["The page holds the tokens of 10 of 40 groups; rollouts.jsonl has all."]


def test_long_runs_become_means(tmp_path):
    steps = [{"step": number, "loss": float(number)} for number in range(1, 8)]
    assert columns(steps, 3) == {"step": [3, 6, 7], "loss": [2.0, 5.0, 7.0]}
    assert columns([{"step": 1, "a": None}, {"step": 2}]) == {"step": [1, 2], "a": [None, None]}


def test_what_differs(tmp_path):
    runs = [read_run(make_run(tmp_path / str(n), concurrency=n)) for n in (1, 8)]
    assert differing(runs) == {"rollout.concurrency": [1, 8]}


def test_nothing_of_the_data_can_leave_its_place():
    html = page({"runs": [], "text": NASTY, "number": float("nan")})
    assert "</script><script>document" not in html
    assert "document.title = 'taken'" in html
    assert html.count("<script") == html.count("</script>") == 3
    assert '"number": null' in html

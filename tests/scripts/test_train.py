"""`python scripts/train.py` as a user types it."""

import json
import re
import signal
from pathlib import Path

import pytest
from transformers import MambaConfig

from grpo.models.tiny import character_tokenizer
from tests.scripts.processes import finish, only_run, processes_of

METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_a_run_leaves_what_the_design_pins(train, tmp_path):
    code, stdout, stderr = finish(
        train(
            "trainer.max_steps=4", "eval.prompts=8", "eval.samples=2", "eval.every=2", "eval.num_cpus=0",
            "observe.rollouts_every=8", "sinks=tensorboard", "observe.report=true",
        )
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    folder = only_run(tmp_path)
    assert f"run folder: {folder}" in stdout
    assert "step 4/4" in stdout
    assert "ray" not in stdout.replace("starting Ray", "")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", 4)
    assert summary["max_policy_age_seen"] <= 1
    assert summary["groups_admitted"] == summary["groups_trained"] + summary["groups_in_flight"]
    assert (summary["eval_first"], summary["eval_last"]) == (0.0, 0.0)
    evaluated = [evaluation["step"] for evaluation in summary["evaluations"]]  # by an evaluator, beside the training
    assert (evaluated[0], evaluated[-1], len(evaluated) + summary["evaluations_skipped"]) == (0, 4, 3)
    assert "held-out reward: 0.000 -> 0.000\nheld-out pass@1 0.000 -> 0.000, pass@2 0.000 -> 0.000\n" in stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["eval/step"] == 4
    assert (folder / "rollouts.jsonl").stat().st_size > 0
    check_names(lines)
    check_timeline(json.loads((folder / "timeline.json").read_text()), lines, summary["groups_trained"])
    check_histograms(folder / "tensorboard", lines)
    assert summary["sinks"] == {"tensorboard": {"errors": 0, "left_out": 0}}
    assert f"report: {folder / 'report.html'}" in stdout
    assert "</html>" in (folder / "report.html").read_text()
    assert "max_policy_age: 1" in (folder / "config.yaml").read_text()
    assert "rror" not in (folder / "run.log").read_text()  # the rollouts that the end cancels are no errors


def check_histograms(folder, lines):
    """Those of the batch agree with the numbers of their step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"histograms": 0})
    events.Reload()
    assert set(events.Tags()["histograms"]) == {"batch/rewards", "batch/completion_tokens", "batch/policy_age"}
    ages = [event.histogram_value for event in events.Histograms("batch/policy_age")]
    assert [age.max for age in ages] == [line["policy_age/max"] for line in lines]
    assert [age.sum / age.num for age in ages] == pytest.approx([line["policy_age/mean"] for line in lines])
    rewards = [event.histogram_value for event in events.Histograms("batch/rewards")]
    assert [each.sum / each.num for each in rewards] == pytest.approx([line["reward/mean"] for line in lines])
    lengths = [event.histogram_value for event in events.Histograms("batch/completion_tokens")]
    assert {each.num for each in lengths} == {16 * 8}
    assert all(1 <= each.min <= each.max <= 12 for each in lengths)


def check_names(lines):
    """A run writes what docs/metrics.md lists, and nothing else."""
    rows = [line.split(" | ") for line in METRICS.read_text().splitlines() if line.startswith("| `")]
    listed = {name.strip("| `"): when.strip("| ") for name, *_, when in rows}
    patterns = {name: re.sub("<.+?>", ".+", name) for name in listed}
    names = {name for line in lines for name in line}
    unlisted = [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns.values())]
    assert not unlisted
    due = [name for name, when in listed.items() if when in ("", "evaluated", "groups finished")]  # of this config
    assert [name for name in due if not any(re.fullmatch(patterns[name], other) for other in names)] == []
    assert len(due) > 30


def check_timeline(events, lines, groups_trained):
    """Every coroutine and actor has a track, every group an arrow, and train steps take as long as the metrics say."""
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {f"rollouts-{i}" for i in range(32)} | {"training", "generator", "reward", "trainer", "evaluator"} <= tracks
    spans = [event for event in events if event["ph"] == "X"]
    names = {span["name"] for span in spans}
    assert {"prefill", "decode", "load", "score", "optimizer", "publish"} <= names
    waited, worked = (
        [span["dur"] / 1e6 for span in spans if (span["cat"], span["name"]) == (kind, "train_step")]
        for kind in ("stage", "busy")
    )
    assert len(waited) == len(worked) == len(lines)
    waited_s = sum(line["time/train_step_s"] for line in lines)
    assert sum(worked) <= sum(waited) == pytest.approx(waited_s, rel=0.02, abs=0.05)
    begun = {event["id"]: event["ts"] for event in events if event["ph"] == "s"}
    taken = {event["id"]: event["ts"] for event in events if event["ph"] == "f"}
    assert len(taken) == groups_trained
    assert all(begun[ticket] < at for ticket, at in taken.items())


@pytest.mark.long
def test_a_second_ctrl_c_ends_it_at_once(train, tmp_path):
    process = train("trainer.max_steps=100000")
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
        if line.startswith("warning: stopping"):
            process.send_signal(signal.SIGTERM)
            break
    code, *_ = finish(process)
    assert code == 130
    assert json.loads((only_run(tmp_path) / "summary.json").read_text())["status"] == "interrupted"
    assert processes_of(process.pid) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.stepz=3"], "error: trainer.stepz: no such key"),
        (["rollout.group_size=1"], "error: rollout.group_size: is 1, must be at least 2"),
        (["rollout.max_prompt_tokens=2"], "error: rollout.max_prompt_tokens: none of the 4000 prompts"),
        (["generator.replicas=500"], "error: generator.num_cpus: the actors ask for 501 CPUs"),
        (["trainer.num_gpus=1", "trainer.ranks=512"], "error: trainer.num_gpus: the actors ask for 512 GPUs"),
        (["cluster.address=127.0.0.1:9"], "error: cluster.address: no Ray cluster at 127.0.0.1:9: Connection refused"),
        (["hydra.run.dir=/proc/run"], "error: hydra.run.dir: can't write to /proc/run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(type_in, overrides, message):
    code, stdout, stderr = type_in("train.py", *overrides)
    assert code == 1
    assert stderr.startswith(message)
    assert len(stderr.splitlines()) == 1
    assert "Traceback" not in stdout


def test_a_model_that_does_not_exist_is_named(type_in):
    code, _, stderr = type_in("train.py", model=["model=hf", "model.path=/nowhere"])
    assert (code, stderr) == (1, "error: model.path: no model folder at '/nowhere' (it would hold a config.json)\n")


@pytest.mark.long
def test_a_model_that_can_not_be_run_is_one_line_and_leaves_no_process(train, tmp_path):
    """Found while Ray starts."""
    folder = tmp_path / "mamba"
    MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    process = train(model=["model=hf", f"model.path={folder}"])
    code, _, stderr = finish(process)
    assert code == 1
    assert re.fullmatch(r"error: ConfigError: generator\.engine: .* MambaForCausalLM.*\n", stderr)
    assert processes_of(process.pid) == []


def test_a_dry_run_finds_a_missing_model_too(type_in):
    code, _, stderr = type_in("train.py", "dry_run=true", model=["model=hf", "model.path=/nowhere"])
    assert code == 1
    assert stderr.startswith("error: model.path: no model folder")


def test_a_sweep_goes_on_after_a_job_that_failed(type_in):
    code, stdout, stderr = type_in("train.py", "-m", "dry_run=true", "task.args.max_letters=99,6")
    assert code == 1
    assert "max_letters" not in stdout
    assert stderr.startswith("error: task.args: there are")
    assert "train step" in stdout


def test_a_dry_run_prints_the_plan_and_starts_nothing(type_in, tmp_path):
    code, stdout, stderr = type_in("train.py", "dry_run=true", "buffer.max_policy_age=3")
    assert (code, stderr) == (0, "")
    for text in ("generator", "replay_buffer", "tickets         64", "staleness       at most 3 versions"):
        assert text in stdout
    assert "ranks" not in stdout
    assert list(tmp_path.glob("outputs/*/*/summary.json")) == []


def test_a_dry_run_says_how_many_ranks_train(type_in):
    code, stdout, _ = type_in("train.py", "dry_run=true", "trainer.ranks=2", "trainer.num_cpus=0.5")
    assert code == 0
    assert "16 groups x 8 completions, shared by 2 ranks" in stdout


def test_a_dry_run_says_what_is_trained_and_who_is_the_reference(type_in):
    code, stdout, stderr = type_in("train.py", "dry_run=true", "lora=r16", "loss.beta=0.1")
    assert (code, stderr) == (0, "")
    assert "trained         adapters of rank 16" in stdout
    assert "reference       the trainer's model with its adapters off" in stdout


def test_hydra_users_find_what_they_know(type_in):
    code, stdout, _ = type_in("train.py", "--cfg", "job", "rollout.concurrency=7")
    assert code == 0
    assert "concurrency: 7" in stdout


@pytest.mark.long
def test_a_sweep_goes_on_after_a_run_whose_rollout_failed_with_its_own_error_shown_once(train, tmp_path):
    """Of three runs the first fails, the second trains, and the third is refused before it starts."""
    process = train(
        "-m", "rollout.group_size=2,4,1", "trainer.max_steps=1",
        "+reward.functions={tests.fake_rewards.raising_on_pairs: 1.0}",
    )  # fmt: skip
    code, stdout, stderr = finish(process)
    assert (code, stderr.count("error: ")) == (1, 2)
    assert "error: RewardError: reward 'tests.fake_rewards.raising_on_pairs' on prompt" in stderr
    assert stderr.count("cannot score this") == 1
    assert "Traceback" not in stdout + stderr
    failed, trained = sorted(path.parent for path in tmp_path.glob("multirun/*/*/*/summary.json"))
    summary = json.loads((failed / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "cannot score this" in summary["error"]
    assert "Traceback" in (failed / "run.log").read_text()
    assert json.loads((trained / "summary.json").read_text())["status"] == "completed"
    *table, last = stdout.splitlines()[-5:]
    rows = [line.split()[:4] for line in table if line.strip()]
    assert rows == [["2", "1", "failed", "0"], ["0", "2", "failed", "0"], ["1", "4", "completed", "1"]]
    (comparison,) = tmp_path.glob("multirun/*/*/comparison.html")
    assert last == f"comparison: {comparison}"
    assert processes_of(process.pid) == []

"""Short runs are typed as a person would; what goes wrong in one is told."""

import textwrap

import pytest

from grpo.errors import TuningError
from grpo.tuning.search import Setting, ShortRuns


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Of a script in place of train.py: it leaves its arguments, and metrics, in the folder it was told."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, pathlib, sys
            if "fail" in sys.argv: sys.exit("starting\\nerror: trainer.lr: is -1")
            if "interrupt" in sys.argv: sys.exit(130)
            folder = pathlib.Path(sys.argv[-1].removeprefix("hydra.run.dir="))
            folder.mkdir(parents=True)
            (folder / "arguments").write_text(" ".join(sys.argv[1:-1]))
            line = {"time/step_s": 2.0, "time/trainer_wait_s": 0.5}
            line |= {"generator/busy_fraction": 0.7, "policy_age/mean": 1.0}
            (folder / "metrics.jsonl").write_text((json.dumps(line) + "\\n") * 8)
            """
        )
    )
    monkeypatch.setattr("grpo.tuning.search._TRAIN", script)
    return lambda *overrides: ShortRuns(overrides, 8, tmp_path / "runs")


def test_a_setting_is_measured_by_a_run_in_a_folder_of_its_own(runs, tmp_path):
    outcome = runs("trainer.lr=1e-3").measure(Setting(1, 12))
    assert (outcome.steps_per_s, outcome.trainer_wait) == (0.5, 0.25)
    assert (outcome.generator_busy, outcome.policy_age) == pytest.approx((0.7, 1.0))
    typed = (tmp_path / "runs" / "age1_concurrency12" / "arguments").read_text().split()
    assert typed[:4] == ["trainer.lr=1e-3", "rollout.concurrency=12", "buffer.max_policy_age=1", "trainer.max_steps=8"]


def test_a_run_that_fails_is_told_with_its_error(runs):
    with pytest.raises(TuningError, match=r"rollout\.concurrency=12 .* failed, trainer\.lr: is -1 \(.*age1_conc"):
        runs("fail").measure(Setting(1, 12))


def test_an_interruption_goes_on_to_the_caller(runs):
    with pytest.raises(KeyboardInterrupt):
        runs("interrupt").measure(Setting(1, 12))

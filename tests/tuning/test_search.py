"""Which settings are tried, which one is named, and how one is measured by a short run."""

import sys
import textwrap

import pytest

from grpo.errors import TuningError
from grpo.tuning.search import Outcome, Setting, ShortRuns, search


class Measured:
    """Runs in which the trainer waits for as long as `wait(age, concurrency)` says; counts them."""

    def __init__(self, wait):
        self._wait, self.tried = wait, []

    def __call__(self, setting):
        self.tried.append(setting)
        return Outcome(1.0, self._wait(setting.max_policy_age, setting.concurrency), 0.5, 0.0)


def enough(age_needed, concurrency_needed):
    return lambda age, concurrency: 0.05 if age >= age_needed and concurrency >= concurrency_needed else 0.5


@pytest.mark.parametrize("age", [0, 1, 2])
@pytest.mark.parametrize("concurrency", [1, 2, 9, 15, 16])
def test_the_smallest_age_and_then_the_smallest_concurrency_that_are_enough(age, concurrency):
    measured = Measured(enough(age, concurrency))
    found = search(measured, groups_per_step=16, ages=(0, 1, 2), target=0.1)
    assert found.enough
    assert found.setting.max_policy_age == age
    assert concurrency <= found.setting.concurrency <= max(concurrency, 1.15 * concurrency)
    assert found.outcome.trainer_wait == 0.05


def test_no_setting_is_measured_twice_and_few_are():
    measured = Measured(enough(1, 19))
    search(measured, groups_per_step=64, ages=(0, 1, 2), target=0.1)
    assert len(measured.tried) == len(set(measured.tried)) <= 10


def test_where_none_is_enough_the_best_is_named():
    found = search(Measured(lambda age, concurrency: 0.6 - 0.1 * age), 16, (0, 1, 2), 0.1)
    assert not found.enough
    assert found.setting == Setting(2, 48)
    assert found.outcome.trainer_wait == pytest.approx(0.4)


def test_a_setting_is_what_one_types():
    assert str(Setting(max_policy_age=1, concurrency=9)) == "rollout.concurrency=9 buffer.max_policy_age=1"


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
    monkeypatch.setattr("grpo.tuning.search._TRAIN", (sys.executable, str(script)))
    return lambda *overrides: ShortRuns(overrides, 8, tmp_path / "runs")


def test_a_setting_is_measured_by_a_run_in_a_folder_of_its_own(runs, tmp_path):
    outcome = runs("trainer.lr=1e-3").measure(Setting(1, 12))
    assert (outcome.steps_per_s, outcome.trainer_wait) == (0.5, 0.25)
    assert (outcome.generator_busy, outcome.policy_age) == pytest.approx((0.7, 1.0))
    typed = (tmp_path / "runs" / "age1_concurrency12" / "arguments").read_text().split()
    assert typed[:4] == ["trainer.lr=1e-3", "rollout.concurrency=12", "buffer.max_policy_age=1", "trainer.max_steps=8"]


def test_a_run_that_fails_is_told_with_its_error(runs):
    with pytest.raises(TuningError, match=r"rollout\.concurrency=12 .* failed: trainer\.lr: is -1 \(.*age1_conc"):
        runs("fail").measure(Setting(1, 12))


def test_an_interruption_goes_on_to_the_caller(runs):
    with pytest.raises(KeyboardInterrupt):
        runs("interrupt").measure(Setting(1, 12))

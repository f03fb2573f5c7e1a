"""`python scripts/tune.py` as a user types it: by short runs, and by a simulation of what one of them says."""

import re

import pytest

from tests.scripts.processes import finish


@pytest.mark.long
def test_a_setting_is_measured_and_then_simulated(run_script, type_in, tmp_path):
    small = ("--steps", "8", "--ages", "0", "--target", "0.01", "trainer.groups_per_step=4")
    code, stdout, stderr = finish(run_script("tune.py", *small, "--out", "runs"))
    assert (code, stderr) == (1, "")  # with age 0 the trainer waits for more than that
    measured = re.search(r"age 0, +4 rollouts: trainer waits +(\d+)%, (\S+) steps/s", stdout)
    assert measured
    assert "the trainer never waits for less than 1%" in stdout
    run = tmp_path / "runs" / "age0_concurrency4"
    assert not (run / "report.html").exists()

    simulated = ("--simulate", str(run))
    code, stdout, _ = type_in("tune.py", *simulated, "--target", "0.9", "--save-profile", "profile.json", model=[])
    assert code == 0
    assert re.search(r"rollout\.concurrency=\d buffer\.max_policy_age=0  trainer waits", stdout)
    code, stdout, _ = type_in("tune.py", *simulated, "--against", str(run), model=[])
    assert code == 0
    assert "age0_concurrency4" in stdout.replace("\n", "")
    elsewhere = ("--lengths", "geometric:6", "--trainer-speed", "0.1", "--target", "0.9")
    code, stdout, _ = type_in("tune.py", "--simulate", "profile.json", *elsewhere)
    assert code == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["rollout.concurency=3"], "error: rollout.concurency: no such key; did you mean rollout.concurrency?\n"),
        (["--simulate", "missing"], "error: missing is not the folder of a run: it has no config.yaml\n"),
        (["--steps", "5"], "error: argument --steps: 5 is too few: the first 5 don't count; --help tells more\n"),
        (["--target", "10"], "error: argument --target: 10 is not between 0 and 1; --help tells more\n"),
        (
            ["--lengths", "fixed:3"],
            "error: --save-profile, --lengths and --against go with --simulate; --help tells more\n",
        ),
        (["--simulate", "x", "--lengths", "long"], "long is no distribution of lengths, such as fixed:64, "),
    ],
)
def test_what_is_wrong_is_told(type_in, words, error):
    code, _, stderr = type_in("tune.py", *words, model=[])
    assert code in (1, 2)
    assert error in stderr

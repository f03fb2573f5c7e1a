"""The experiments for GPUs, as far as they can be looked at without any."""

import json

import pytest

GPUS = {"gsm8k": 8, "gsm8k_1gpu": 1, "gsm8k_multinode": 16}


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n} + 3?", "answer": f"#### {n + 3}"}) + "\n" for n in range(99)))
    return f"task.path={path}"


@pytest.mark.parametrize("experiment", GPUS)
def test_the_plan_of_an_experiment_adds_up(type_in, problems, experiment):
    """For a cluster, which a dry run does not ask; with the engine that is installed here."""
    small = ("generator.engine=torch", "task.template=plain", "rollout.max_completion_tokens=8")
    words = ("dry_run=true", "cluster.address=auto", problems, *small)
    code, stdout, stderr = type_in("train.py", f"+experiment={experiment}", *words)
    assert not stderr
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in stdout.splitlines() if line.startswith("│")]
    assert sum(int(row[1]) * float(row[3]) for row in rows) == GPUS[experiment]


@pytest.mark.parametrize("experiment", GPUS)
def test_without_gpus_an_experiment_is_refused_in_one_line(type_in, problems, experiment):
    code, stdout, stderr = type_in("train.py", f"+experiment={experiment}", problems, "cluster.address=null")
    assert code == 1
    assert f"the actors ask for {GPUS[experiment]} GPUs (" in stderr
    assert "but this machine has 0; to run without, take +experiment=gsm8k_cpu or set generator.engine=torch" in stderr
    assert (stderr[:7], len(stderr.splitlines()), stdout) == ("error: ", 1, "")

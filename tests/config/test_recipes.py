"""What docs/clusters.md and docker/ say to type, as far as it can be looked at without a cluster."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
STAND_INS = {
    "scontrol": "printf 'one\\ntwo\\n'",
    "openssl": "echo token",
    "srun": 'echo "$@" >> calls; case "$*" in *"ray start --head"*) exec $HEAD;; *health-check*) exec $HEALTH;; esac',
}


@pytest.fixture
def submit(tmp_path):
    """Run the Slurm script of docs/clusters.md where Slurm's commands only note what they are given."""
    block = re.search(r"^    #!/bin/bash\n(?:    .*\n|\n)+", (ROOT / "docs/clusters.md").read_text(), re.MULTILINE)
    script = "".join(line.removeprefix("    ") for line in block[0].splitlines(keepends=True))
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    slurm = {
        "JOB_NODELIST": "[one,two]",
        "JOB_NUM_NODES": "2",
        "JOB_ID": "7",
        "GPUS_ON_NODE": "8",
        "CPUS_PER_TASK": "64",
    }
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {f"SLURM_{name}": value for name, value in slurm.items()}

    def submit(*arguments, head, health):
        done = subprocess.run(
            ["bash", "-c", script, "script", *arguments],
            env={**environment, "HEAD": head, "HEALTH": health},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return done, (tmp_path / "calls").read_text().splitlines()

    return submit


def test_the_slurm_script_runs_on_all_nodes_once_the_head_answers(submit):
    done, calls = submit("trainer.max_steps=3", head="true", health="true")
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = (call for call in calls if "train.py" in call)
    assert re.search(r"--nodelist=one python .* cluster.address=one:20007 .*slurm-7 trainer.max_steps=3$", run)
    assert sum("ray start" in call and "--object-store-memory=" in call for call in calls) == 2
    assert any("--exclude=one ray start --address=one:20007 --num-cpus=64 --num-gpus=8" in call for call in calls)


def test_the_slurm_script_ends_when_the_head_could_not_be_started(submit):
    done, calls = submit(head="false", health="false")
    assert (done.returncode, done.stderr) == (1, "ray start --head has ended\n")
    assert not any("train.py" in call for call in calls)


def size(text):
    number, unit = re.fullmatch(r"(\d+)(Gi?|g)", text).groups()
    return int(number) * (10**9 if unit == "G" else 2**30)


def test_the_object_stores_fit_into_the_shared_memory_that_they_get():
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    for service in compose["services"].values():
        (store,) = (word for word in service["command"] if "object-store-memory" in word)
        assert int(re.search(r"\d+", store)[0]) < size(re.search(r"\d+g", service["shm_size"])[0])
    _, job = yaml.safe_load_all((ROOT / "docker/kuberay.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (shared,) = (each["emptyDir"]["sizeLimit"] for each in pod["volumes"] if each["name"] == "shared-memory")
        assert int(group["rayStartParams"]["object-store-memory"]) < size(shared)
        assert size(shared) < size(pod["containers"][0]["resources"]["limits"]["memory"])

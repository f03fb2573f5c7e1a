"""A node that shares no file system with the driver: it has Python and the libraries, and is brought all else."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.ray_nodes import ENVIRONMENT, ROOT, JoinedNode

pytestmark = pytest.mark.long

OWN_TASK = '''
"""A task of somebody's own, which reads a file, with a reward of its own."""

import os
from pathlib import Path

import own_words
from grpo.types import Problem

class Words:
    def __init__(self, path, **args):
        self._words = Path(path).read_text().split()

    def problems(self, split):
        return [Problem(word, word[0]) for word in self._words]

    def score(self, problem, text):
        return own_words.share(text, problem.answer)

def there(problem, completions):
    """1 where what the driver has on its disk can not be seen."""
    return [float(not os.path.exists("{seen}"))] * len(completions)
'''

OWN_WORDS = """
def share(text, letter):
    return text.count(letter) / max(1, len(text))
"""


@pytest.fixture
def own_code(tmp_path):
    """A folder with modules of a user's, and a file of problems."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own_task.py").write_text(OWN_TASK.replace("{seen}", str(tmp_path)))
    (folder / "own_words.py").write_text(OWN_WORDS)
    (tmp_path / "words.txt").write_text("abc bca cab acb bac cba")
    return folder


@pytest.fixture
def other_version():
    """A folder of the driver's machine that the node sees, with another module of the same name."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "own_words.py").write_text("raise ImportError('another version')")
        yield folder


def test_a_node_gets_code_model_and_problems_without_a_shared_file_system_and_is_left_as_it_was(
    nodes, own_code, other_version, tmp_path, tiny_model_path
):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs to mount, to hide the driver's files from a node")
    joined = [JoinedNode(nodes.address, nodes.start(cpus=0))]
    source = [ROOT / name for name in ("grpo", "tests", "scripts", "configs")]
    hidden = [*source, tmp_path.parent, Path(tiny_model_path).parent]
    joined.append(JoinedNode(nodes.address, nodes.start(cpus=3, hidden=hidden)))
    run = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "scripts/train.py"), f"cluster.address={nodes.address}", f"hydra.run.dir={run}",
            "model=hf", f"model.path={tiny_model_path}", "task.target=own_task:Words",
            f"task.path={tmp_path / 'words.txt'}", "+reward.functions={own_task.there: 1.0}", "reward.num_cpus=1",
            "rollout.max_prompt_tokens=8", "rollout.max_completion_tokens=8", "trainer.max_steps=2",
            "trainer.groups_per_step=2", "eval.prompts=0", "checkpoint.every=2",
        ],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{own_code}"},
        cwd=other_version,
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(node.guests_after_a_while() == {} and node.is_whole() for node in joined)
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    for line in (run / "rollouts.jsonl").read_text().splitlines():
        assert set(json.loads(line)["reward_parts"]["own_task.there"]) == {1.0}
    assert "pid=" not in (run / "run.log").read_text()  # no actor has anything to warn of
    assert (run / "checkpoints/step_000002").is_dir()
    assert (run / "report.html").is_file()

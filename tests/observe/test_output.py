import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, subprocess, sys
from pathlib import Path
from grpo.observe.output import chatter_to
with chatter_to(Path(sys.argv[1])) as console:
    print("chatter of python")
    os.write(2, b"chatter of native code\\n")
    subprocess.run(["echo", "chatter of a child"])
    console.print("progress")
print("afterwards")
"""


def test_only_the_console_reaches_the_terminal(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "log")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "progress\nafterwards\n"
    assert done.stderr == ""
    log = (tmp_path / "log").read_text()
    assert all(f"chatter of {who}" in log for who in ("python", "native code", "a child"))

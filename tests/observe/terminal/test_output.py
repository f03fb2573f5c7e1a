import os
import pty
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, subprocess, sys
from pathlib import Path
from grpo.observe.terminal.output import redirect_output
with redirect_output(Path(sys.argv[1])) as console:
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


BROKEN = """
import sys, time
from pathlib import Path
from grpo.observe.terminal.output import redirect_output
with redirect_output(Path(sys.argv[1])) as console:
    for i in range(3000):
        console.print("progress in one line", highlight=False)
    print("the work went on")
"""


def test_a_reader_that_goes_away_does_not_end_the_work(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", BROKEN, str(tmp_path / "log")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    _, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")
    assert "the work went on" in (tmp_path / "log").read_text()


LIVE = """
import asyncio
import sys
from pathlib import Path
from grpo.observe.terminal.display import make_display
from grpo.observe.terminal.output import redirect_output
async def main():
    with redirect_output(Path(sys.argv[1])) as console, make_display(console, 10, 1) as display:
        print("chatter to stdout")
        print("chatter to stderr", file=sys.stderr)
        display.warn("look here")
asyncio.run(main())
"""


def test_the_live_view_in_a_terminal_leaves_the_chatter_in_the_log(tmp_path: Path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", LIVE, str(tmp_path / "log")], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end of a terminal was closed
            break
        if not part:
            break
        shown += part
    assert process.wait(timeout=300) == 0
    os.close(ours)
    assert b"look here" in shown
    assert b"chatter" not in shown
    assert (tmp_path / "log").read_text().count("chatter") == 2

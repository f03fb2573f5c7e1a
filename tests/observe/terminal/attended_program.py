"""What a shell runs in test_terminal.py: says what happens to its viewer until `x` is pressed."""

import asyncio
import os
import sys

from grpo.observe.terminal.job_control import foreground_terminal, terminal_behind


class Viewer:
    def __init__(self):
        self.ended = asyncio.Event()

    def show(self):
        print(f"[{os.getpid()} shown]", flush=True)

    def hide(self):
        print("[hidden]", flush=True)

    def press(self, key):
        print(f"[key {key}]", flush=True)
        if key == "x":
            self.ended.set()


async def main():
    viewer = Viewer()
    with foreground_terminal(viewer, terminal_behind(sys.stdout, sys.stdin)):
        await viewer.ended.wait()


asyncio.run(main())

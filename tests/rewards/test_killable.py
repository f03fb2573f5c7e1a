from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from grpo.rewards.killable import Killable
from grpo.types import RewardError, RewardTimeout


def behave(how):
    if how == "hang":
        time.sleep(600)
    if how == "hang in C":
        sum(itertools.repeat(0))  # holds the GIL and looks at no signal
    if how == "die":
        os._exit(3)
    if how == "raise":
        raise KeyError(how)
    return os.getpid() if how == "pid" else how


def heavy_modules(_):
    return sorted({"torch", "transformers", "ray"} & set(sys.modules))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killable():
    made = Killable(behave, timeout_s=1.0, workers=1)
    yield made
    made.close()


def calls(*behaviours):
    return [(how,) for how in behaviours]


def test_results_come_in_order_from_another_process(killable):
    assert killable.map(calls("a", "b", "c")) == ["a", "b", "c"]
    (pid,) = killable.map(calls("pid"))
    assert pid != os.getpid()
    assert killable.map([]) == []


@pytest.mark.parametrize("how", ["hang", "hang in C"])
def test_a_hang_is_a_timeout_and_its_process_is_killed(killable, how):
    (pid,) = killable.map(calls("pid"))
    with pytest.raises(RewardTimeout, match="timeout: took longer than 1 s and was killed"):
        killable.map(calls("fine", how, "fine"))
    wait_until(lambda: not alive(pid))
    assert killable.map(calls("fine")) == ["fine"]


def test_a_crash_is_an_error_and_the_next_call_is_fine(killable):
    with pytest.raises(RewardError, match="died with exit code 3") as raised:
        killable.map(calls("die"))
    assert not isinstance(raised.value, RewardTimeout)
    assert killable.map(calls("fine")) == ["fine"]


def test_what_the_function_raises_comes_as_it_is(killable):
    with pytest.raises(KeyError, match="raise"):
        killable.map(calls("fine", "raise"))


def test_the_time_spent_waiting_for_a_process_does_not_count(killable):
    killable.map(calls("fine"))
    results = []
    threads = [threading.Thread(target=lambda: results.extend(killable.map(calls(*["x"] * 300)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["x"] * 1200


def test_it_recovers_when_an_idle_process_is_killed_from_outside(killable):
    (pid,) = killable.map(calls("pid"))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not killable._pool.active)
    assert killable.map(calls("fine")) == ["fine"]


def test_close_ends_the_processes_and_a_later_call_starts_new_ones():
    killable = Killable(behave, timeout_s=30.0, workers=1)
    killable.close()
    (first,) = killable.map(calls("pid"))
    killable.close()
    assert not alive(first)
    (second,) = killable.map(calls("pid"))
    assert second != first
    killable.close()


def test_the_processes_start_without_heavy_libraries():
    killable = Killable(heavy_modules, timeout_s=30.0, workers=1)
    assert killable.map([(None,)]) == [[]]
    killable.close()


@pytest.mark.parametrize("busy", [False, True])
def test_nothing_is_left_when_the_parent_is_killed(busy):
    script = (
        "import threading, time\n"
        "from tests.rewards.test_killable import Killable, behave\n"
        "if __name__ == '__main__':\n"
        "    killable = Killable(behave, timeout_s=1.0, workers=1)\n"
        "    print(*killable.map([('pid',)]), flush=True)\n"
        f"    killable.map([('hang in C',)]) if {busy} else time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.3)  # so that the busy one has begun
        assert alive(pid)
        parent.kill()
    wait_until(lambda: not alive(pid))

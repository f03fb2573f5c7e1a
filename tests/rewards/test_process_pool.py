from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import pytest_asyncio

from grpo.errors import ConfigError, RewardCrash, RewardError, RewardMemory, RewardTimeout
from grpo.rewards.process_pool import ProcessPool

pytestmark = pytest.mark.asyncio(loop_scope="module")  # to start a process takes a while: most tests share two

PATIENT, HASTY = 60.0, 0.5


class OddError(Exception):
    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")


def behaviour():
    return behave


def behave(set_label, how, *args):
    set_label(how)
    return BEHAVIOURS[how](*args)


def fail(kind, *args):
    raise kind(*args)


def hang_once(path):
    if path.exists():
        return "the second time"
    path.write_text(f"{os.getpid()}\n")
    return time.sleep(600)


def write_then(path, then):
    child = subprocess.Popen(["sleep", "600"])
    with open(path, "w") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    BEHAVIOURS[then]()


def exit_of_a_child():
    child = multiprocessing.get_context("spawn").Process(target=os._exit, args=(5,))
    child.start()
    child.join()
    return child.exitcode


BEHAVIOURS = {
    "say": lambda word: word,
    "pid": os.getpid,
    "hang": lambda: time.sleep(600),
    "hang in C": lambda: sum(itertools.repeat(0)),  # holds the GIL and looks at no signal
    "exit": lambda: os._exit(3),
    "segfault": lambda: ctypes.string_at(0),
    "take": lambda size: len(bytearray(size)),
    "fail": fail,
    "print": lambda: print("hello"),
    "write then": write_then,
    "hang once": hang_once,
    "child": exit_of_a_child,
    "path": lambda: sys.path,
    "modules": lambda: sorted({"torch", "transformers", "ray"} & set(sys.modules)),
}


def refuse(how):
    if how == "exit":
        os._exit(4)
    raise how


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"  # nobody waits for orphans in a bare container
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids_in(path):
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return list(map(int, path.read_text().split()))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def patient():
    pool = ProcessPool(behaviour, (), workers=1, timeout_s=PATIENT, memory_gb=0.25)
    await pool.start()
    yield pool
    await pool.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hasty():
    pool = ProcessPool(behaviour, (), workers=1, timeout_s=HASTY)
    await pool.start()
    yield pool
    await pool.close()


async def test_results_come_from_another_process(patient):
    assert await asyncio.gather(*(patient.call("say", word) for word in "abc")) == ["a", "b", "c"]
    assert await patient.call("pid") != os.getpid()


async def test_a_process_is_small_and_finds_the_modules_that_its_parent_finds(patient):
    assert await patient.call("modules") == []
    assert await patient.call("path") == sys.path


@pytest.mark.parametrize("how", ["hang", "hang in C"])
async def test_a_hang_is_a_timeout_that_names_what_hung(hasty, how):
    pid = await hasty.call("pid")
    with pytest.raises(RewardTimeout, match=f"^{how}: took longer than 0.5 s and was killed$"):
        await hasty.call(how)
    assert not alive(pid)
    assert await hasty.call("say", "fine") == "fine"


@pytest.mark.parametrize(
    ("how", "ending"), [("exit", "exit code 3"), ("segfault", r"signal 11 \(Segmentation fault\)")]
)
async def test_a_crash_says_how_the_process_ended(patient, how, ending):
    with pytest.raises(RewardCrash, match=f"^{how}: its process died with {ending}$"):
        await patient.call(how)
    assert await patient.call("say", "fine") == "fine"


async def test_memory_is_limited_beyond_what_a_process_starts_with(patient):
    pid = await patient.call("pid")
    assert await patient.call("take", 100 << 20) == 100 << 20
    assert await patient.call("pid") == pid
    with pytest.raises(MemoryError):
        await patient.call("take", 300 << 20)
    assert await patient.call("say", "fine") == "fine"


async def test_a_process_that_ran_out_of_memory_is_replaced(patient):
    pid = await patient.call("pid")
    with pytest.raises(RewardMemory, match="too much"):
        await patient.call("fail", RewardMemory, "too much")
    assert await patient.call("pid") != pid


async def test_what_is_raised_keeps_its_type_and_its_traceback(patient):
    pid = await patient.call("pid")
    with pytest.raises(KeyError, match="gold") as raised:
        await patient.call("fail", KeyError, "gold")
    assert "in fail\n    raise kind(*args)" in raised.value.__notes__[0]
    arrived = pickle.loads(pickle.dumps(raised.value))
    assert arrived.__notes__ == raised.value.__notes__
    assert await patient.call("pid") == pid


@pytest.mark.parametrize(
    ("error", "told"),
    [((OddError, 7, "x"), "OddError: 7: x"), ((SystemExit, 2), "SystemExit: 2"), ((KeyboardInterrupt,), "Keyboard")],
)
async def test_an_error_of_an_unknown_class_is_retold(patient, error, told):
    with pytest.raises(RewardError, match=told) as raised:
        await patient.call("fail", *error)
    assert type(raised.value) is RewardError


class OnlyHere:
    """Can be sent, but not read."""

    def __reduce__(self):
        return fail, (ZeroDivisionError, "gone")


async def test_an_argument_that_can_not_be_read_there_is_an_error(patient):
    with pytest.raises(RewardError, match="another process can't unpickle: gone"):
        await patient.call("say", OnlyHere())


async def test_what_is_printed_is_not_lost_when_the_process_is_killed(capfd):
    pool = ProcessPool(behaviour, (), workers=1, timeout_s=PATIENT)
    await pool.start()
    await pool.call("print")
    await pool.close()
    assert capfd.readouterr().out == "hello\n"


async def test_an_argument_that_can_not_be_sent_is_an_error(patient):
    with pytest.raises(RewardError, match="can't be pickled for another process"):
        await patient.call("say", lambda: None)
    assert await patient.call("say", "fine") == "fine"


async def test_the_function_may_have_processes_of_its_own(patient):
    assert await patient.call("child") == 5


async def test_a_process_killed_from_outside_while_idle_is_replaced(patient):
    pid = await patient.call("pid")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG))
    assert await patient.call("pid") != pid


async def test_a_call_whose_process_is_killed_from_outside_is_made_once_more(patient, tmp_path):
    call = asyncio.create_task(patient.call("hang once", tmp_path / "pid"))
    (pid,) = await asyncio.to_thread(pids_in, tmp_path / "pid")
    os.kill(pid, signal.SIGKILL)
    assert await call == "the second time"


async def test_a_call_whose_process_is_killed_twice_is_a_crash(patient, tmp_path):
    call = asyncio.create_task(patient.call("write then", tmp_path / "pids", "hang"))
    for _ in range(2):
        pid, _ = await asyncio.to_thread(pids_in, tmp_path / "pids")
        (tmp_path / "pids").unlink()
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(RewardCrash, match="signal 9"):
        await call
    assert await patient.call("say", "fine") == "fine"


async def test_a_process_that_does_not_even_read_what_is_sent_to_it_times_out(hasty):
    pid = await hasty.call("pid")
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(RewardTimeout, match=r"took longer than 0.5 s and was killed"):
        await hasty.call("say", "x" * 10_000_000)
    assert not alive(pid)
    assert await hasty.call("say", "fine") == "fine"


async def test_a_cancelled_call_is_killed_with_the_processes_it_started(patient, tmp_path):
    call = asyncio.create_task(patient.call("write then", tmp_path / "pids", "hang in C"))
    pids = await asyncio.to_thread(pids_in, tmp_path / "pids")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.to_thread(wait_until, lambda: not any(map(alive, pids)))
    assert await patient.call("say", "fine") == "fine"


async def test_what_became_of_a_cancelled_call_is_nobodys_loss(patient, tmp_path, caplog):
    """asyncio would log an exception that is never asked for."""
    call = asyncio.create_task(patient.call("write then", tmp_path / "pids", "hang in C"))
    await asyncio.to_thread(pids_in, tmp_path / "pids")
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    del call
    assert [await patient.call("say", "fine") for _ in range(3)] == ["fine"] * 3  # its process has ended by then
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_the_time_spent_waiting_for_a_process_does_not_count(hasty):
    waits = [asyncio.create_task(hasty.call("hang")) for _ in range(2)]
    assert await hasty.call("say", "fine") == "fine"  # after twice the time-out
    for wait in waits:
        with pytest.raises(RewardTimeout):
            await wait


async def test_a_call_that_was_cancelled_while_it_waited_leaves_no_trace(hasty):
    hang = asyncio.create_task(hasty.call("hang"))
    waiting = asyncio.create_task(hasty.call("hang"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(RewardTimeout):
        await hang
    assert await hasty.call("say", "fine") == "fine"
    assert waiting.cancelled()


async def test_a_call_cancelled_at_any_moment_leaves_a_pool_that_works():
    pool = ProcessPool(behaviour, (), workers=1, timeout_s=PATIENT)
    await pool.start()
    for yields in range(12):
        call = asyncio.create_task(pool.call("say", "done"))
        for _ in range(yields):
            await asyncio.sleep(0.0001)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert await pool.call("say", "fine") == "fine"
    await pool.close()


async def test_a_hang_holds_up_only_its_own_process_and_close_ends_it(tmp_path):
    pool = ProcessPool(behaviour, (), workers=2, timeout_s=PATIENT)
    await pool.start()
    hang = asyncio.create_task(pool.call("write then", tmp_path / "pids", "hang in C"))
    pids = await asyncio.to_thread(pids_in, tmp_path / "pids")
    assert [await pool.call("say", word) for word in "abc"] == ["a", "b", "c"]
    idle = await pool.call("pid")
    waiting = [asyncio.create_task(pool.call("hang")) for _ in range(3)]
    await asyncio.sleep(0)
    await pool.close()
    for call in (hang, *waiting):
        with pytest.raises(RewardCrash):
            await call
    assert not alive(idle)
    wait_until(lambda: not any(map(alive, pids)))
    with pytest.raises(RewardCrash, match="closed"):
        await pool.call("say", "late")
    await pool.close()


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        (ConfigError("is wrong", key="task.args"), ConfigError, r"^task\.args: is wrong"),
        (FileNotFoundError(2, "no file"), FileNotFoundError, "no file"),
        (ValueError("bad"), ValueError, "^bad"),
        ("exit", RewardCrash, "a reward process: its process died with exit code 4"),
    ],
)
async def test_start_raises_what_building_raises_and_leaves_nothing(how, kind, message):
    pool = ProcessPool(refuse, (how,), workers=2, timeout_s=PATIENT)
    with pytest.raises(kind, match=message):
        await pool.start()
    assert all(worker.killed and worker._process is None for worker in pool._workers)


@pytest.mark.parametrize("how", ["pid", "hang", "hang in C"])
async def test_nothing_is_left_when_the_parent_is_killed(how, tmp_path):
    script = (
        "import asyncio, time\n"
        "from tests.rewards.test_process_pool import ProcessPool, behaviour\n"
        "async def main():\n"
        "    pool = ProcessPool(behaviour, (), workers=1, timeout_s=600.0)\n"
        "    await pool.start()\n"
        "    print(await pool.call('pid'), flush=True)\n"
        f"    await pool.call('write then', {str(tmp_path / 'pids')!r}, {how!r})\n"
        "    time.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:  # noqa: ASYNC220, this test is alone
        pid = int(parent.stdout.readline())
        _, child = pids_in(tmp_path / "pids")
        assert alive(pid)
        parent.kill()
    wait_until(lambda: not alive(pid))
    os.kill(child, signal.SIGKILL)  # what user code has started itself is not followed that far

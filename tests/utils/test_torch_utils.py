"""Devices that torch does not find, played by patches of torch; compute threads."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch

from grpo.config.schema import RunConfig
from grpo.driver.weight_sync import broadcast_backend
from grpo.errors import ConfigError
from grpo.utils import torch_utils as compute
from grpo.utils.torch_utils import BusyClock, ComputeThread, check_device, device_for, run_in_temp_thread


def test_a_share_of_a_gpu_is_on_it():
    assert [device_for(share) for share in (0, 0.25, 1, 8)] == ["cpu", "cuda", "cuda", "cuda"]
    check_device("cpu", "bfloat16")


@pytest.mark.parametrize(
    ("trainer", "generator", "engine", "backend"),
    [(0, 0, "torch", "gloo"), (1, 2, "torch", "nccl"), (0.5, 0.5, "torch", "gloo"), (1, 0, "torch", "gloo"),
     (1, 1, "vllm", "gloo")],
)  # fmt: skip
def test_weights_go_over_nccl_where_all_have_whole_gpus_to_themselves(trainer, generator, engine, backend):
    config = RunConfig()
    config.trainer.num_gpus, config.generator.num_gpus, config.generator.engine = trainer, generator, engine
    assert broadcast_backend(config) == backend
    config.trainer.ranks = 2
    assert broadcast_backend(config) == "gloo"
    config.trainer.ranks, config.weight_sync.backend = 1, "gloo"
    assert broadcast_backend(config) == "gloo"


@pytest.mark.parametrize(
    ("built_for", "reason"), [(None, "it is built without CUDA"), ("13.0", "the driver is missing or too old")]
)
def test_a_gpu_that_torch_does_not_find_is_one_line_with_the_reason(monkeypatch, built_for, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(ConfigError, match=rf"num_gpus: Ray gave .* GPU, but torch .* can't use it: {reason}\."):
        check_device("cuda", "float32")


def test_bfloat16_is_refused_where_it_would_be_emulated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    check_device("cuda", "float32")
    with pytest.raises(ConfigError, match=r"model\.dtype: Tesla T4 can't compute in bfloat16 .*\. Use float32"):
        check_device("cuda", "bfloat16")


@pytest.fixture
def thread():
    thread = ComputeThread("test")
    yield thread
    thread.close()


@pytest.fixture
def clock(monkeypatch):
    """The thread's clock; it stands still unless the work moves it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(compute, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


async def test_work_runs_in_order_and_one_at_a_time(thread):
    events = []

    def work(i):
        events.append(("begin", i))
        events.append(("end", i))
        return i

    assert await asyncio.gather(*(thread.run(work, i) for i in range(20))) == list(range(20))
    assert events == [(what, i) for i in range(20) for what in ("begin", "end")]


async def test_all_work_shares_one_thread_that_is_not_the_loops(thread):
    gate = threading.Event()

    def work():
        gate.wait(30)  # a second thread would have to be started for what is submitted meanwhile
        return threading.current_thread()

    tasks = [asyncio.create_task(thread.run(work)) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    threads = set(await asyncio.gather(*tasks))
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    assert threads.pop().name.startswith("test")


async def test_the_loop_goes_on_while_work_runs(thread):
    gate = threading.Event()
    running = asyncio.create_task(thread.run(gate.wait, 30))
    await asyncio.sleep(0)
    gate.set()  # reached only because the loop is free
    assert await running


async def test_arguments_reach_the_work(thread):
    assert await thread.run(sorted, [3, 1, 2], reverse=True) == [3, 2, 1]


async def test_busy_time_adds_up_also_over_failures(thread, clock):
    def work(seconds, *, fail=False):
        clock.now += seconds
        if fail:
            raise ValueError("failed")

    await thread.run(work, 2.0)
    clock.now += 100.0  # idle
    with pytest.raises(ValueError, match="failed"):
        await thread.run(work, 3.0, fail=True)
    await asyncio.gather(thread.run(work, 1.0), thread.run(work, 4.0))
    assert thread.busy_s == 10.0


async def test_an_exception_is_raised_at_the_await_and_the_thread_goes_on(thread):
    def fail():
        raise KeyError("inside the work")

    failing, following = await asyncio.gather(thread.run(fail), thread.run(lambda: "fine"), return_exceptions=True)
    assert isinstance(failing, KeyError)
    assert following == "fine"


async def test_torch_uses_as_many_threads_as_asked_for():
    thread = ComputeThread("test", torch_threads=1)
    try:
        assert await thread.run(torch.get_num_threads) == 1
    finally:
        thread.close()


async def test_close_waits_for_the_work_at_hand():
    thread, gate, done = ComputeThread("test"), threading.Event(), []

    def work():
        gate.wait(30)
        done.append(True)

    running = asyncio.create_task(thread.run(work))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(gate.set)
    await asyncio.to_thread(thread.close)
    assert done == [True]
    await running
    with pytest.raises(RuntimeError):
        await thread.run(work)


def test_a_busy_clock_counts_overlapping_work_once(clock):
    busy = BusyClock()
    clock.now = 5.0  # idle until here
    with busy.busy():
        clock.now = 6.0
        with busy.busy():
            clock.now = 8.0
        assert busy.seconds == 3.0
        clock.now = 9.0
    clock.now = 20.0
    assert busy.seconds == 4.0


async def test_work_run_apart_leaves_no_thread_behind():
    ran_in = await run_in_temp_thread(1, threading.current_thread)
    assert ran_in is not threading.current_thread()
    assert not ran_in.is_alive()
    with pytest.raises(ZeroDivisionError):
        await run_in_temp_thread(1, lambda: 1 / 0)

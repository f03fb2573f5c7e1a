"""Thousands of short steps: the driver, the actors and the object store stay as large as they are. For `make chaos`."""

import asyncio
import os
from pathlib import Path
from statistics import fmean

import ray

from grpo.cluster.launch import launch
from grpo.driver.loop import train_loop

STEPS, EVERY = 2000, 50
MIB = 2**20


async def test_a_long_run_does_not_grow(tiny_config, make_recorder, ray_session, capsys):
    tiny_config.trainer.max_steps, tiny_config.trainer.lr = STEPS, 1e-4
    tiny_config.checkpoint.every, tiny_config.checkpoint.keep = 200, 1
    recorder = make_recorder(tiny_config)
    tiny_config.checkpoint.dir = str(recorder.run_dir.path / "checkpoints")
    sizes = []
    async with launch(tiny_config, recorder.failures) as services:
        pids = {"driver": os.getpid()}
        for name in ("dataloader", "generator", "reward", "replay_buffer", "trainer", "checkpointer"):
            (replica,) = getattr(services, name).service.replicas
            pids[name] = replica.endpoint.pid

        async def watch():
            while recorder.step < STEPS:
                await recorder.failures.progress.wait()
                if recorder.step % EVERY == 0:
                    store = await asyncio.to_thread(object_store_mib)
                    sizes.append({name: resident_mib(pid) for name, pid in pids.items()} | {"object store": store})

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(train_loop(services, tiny_config, recorder, asyncio.Event()))
            tasks.create_task(watch())
    half = len(sizes) // 2
    quarter = half // 2
    with capsys.disabled():
        print(f"\nMiB over {STEPS} steps: means of the second quarter, the third, and the end")
        for name in sizes[0]:
            at = [
                fmean(size[name] for size in part) for part in (sizes[quarter:half], sizes[half:-quarter], sizes[-5:])
            ]
            print(f"  {name:<14}" + "".join(f"{value:10.1f}" for value in at))
    for name in sizes[0]:
        before = fmean(size[name] for size in sizes[half : half + 5])
        after = fmean(size[name] for size in sizes[-5:])
        assert after - before < max(8.0, 0.02 * before), f"{name} grew from {before:.1f} to {after:.1f} MiB"


def resident_mib(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def object_store_mib():
    """What lies in the object store of this node."""
    there, free = ray.cluster_resources(), ray.available_resources()
    return (there["object_store_memory"] - free["object_store_memory"]) / MIB

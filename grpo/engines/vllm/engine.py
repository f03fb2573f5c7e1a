"""Bytes that another process of this node can read without a copy."""

# MERGED: vLLM as the engine, through its asynchronous interface (extra `vllm`).
#
#     generator actor                         vLLM's engine process (with tensor parallelism: and its workers)
#       generate        -- token ids -->        continuous batching over a paged KV cache
#       update_weights  -- shared memory -->    vllm_worker.py: loaded in place while generation pauses
#
# Token ids go in, token ids and log-probabilities come out as they were sampled: nothing is tokenized a second time.
#

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from itertools import count
from multiprocessing.process import BaseProcess
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from grpo.engines.base import Limits, WeightUpdate
from grpo.engines.vllm.params import as_completion, check_installed, cpu_settings, sampling_params, set_environment
from grpo.errors import ActorDied, ConfigError
from grpo.types import Completion, GeneratorStats, Ints, SamplingParams
from grpo.utils.aio import gather_or_cancel
from grpo.utils.torch_utils import BusyClock, run_in_temp_thread
from grpo.weights.adapters import Merge
from grpo.weights.payload import Weights, check_fit, check_intact


class SharedBuffer:
    """A file that exists only in memory (memfd): nothing to clean up when a process dies, no limit of /dev/shm.

    Another process of the same user maps `path`; the memory is freed when the last mapping is gone. Linux only.
    """

    def __init__(self, size: int) -> None:
        self._file = os.memfd_create("grpo-weights")
        os.ftruncate(self._file, size)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r+", shape=(size,))

    def write(self, buffer: NDArray[np.uint8]) -> None:
        """Replace the contents by `buffer`, uint8 [size]. Readers see it at once."""
        np.copyto(self._bytes, buffer)

    def close(self) -> None:
        os.close(self._file)


def read_shared(path: str, size: int) -> NDArray[np.uint8]:
    """A read-only view, uint8 [size], of a SharedBuffer of another process."""
    return np.memmap(path, dtype=np.uint8, mode="r", shape=(size,))


R = TypeVar("R")
WORKER = "grpo.engines.vllm.worker"
BACKEND = "grpo_shared_memory"  # the name under which the worker registers how weights come in
_PAUSE: dict[WeightUpdate, dict[str, Any]] = {
    "in_flight": {"mode": "keep", "clear_cache": False},
    "in_flight_recompute": {"mode": "keep", "clear_cache": True},
    "drain": {"mode": "wait", "clear_cache": True},
}
_SHUTDOWN_TIMEOUT_S = 1.0


class VLLMEngine:
    """Made by `start`; `close` it when done. `weight_update` as in TorchEngine.

    Only what vLLM has room for is handed over, and nothing during an update: what waits is not begun until it is known
    which weights will read it. Cached prefixes are reused within a policy version: it salts the cache. (In flight, a
    completion that was handed over just before a pause may still share a prefix that was read before it.)
    """

    def __init__(
        self,
        llm: Any,
        processes: Sequence[BaseProcess],
        *,
        stop_token_ids: Sequence[int],
        shapes: Mapping[str, tuple[int, ...]],
        limits: Limits,
        weight_update: WeightUpdate,
        merge: Merge | None = None,
        threads: int = 0,
    ) -> None:
        self.version = 0
        self._llm, self._processes = llm, processes
        self._shapes, self._limits, self._weight_update = shapes, limits, weight_update
        self._merge, self._threads = merge, threads
        self._stop_token_ids = tuple(stop_token_ids)
        self._memory: SharedBuffer | None = None
        self._places = asyncio.Semaphore(limits.max_sequences)
        self._accepting = asyncio.Event()  # no update is under way
        self._accepting.set()
        self._updating = asyncio.Lock()
        self._request_ids = count()
        self._clock = BusyClock()
        self._tokens = 0
        self._closed = False
        self._under_way: set[asyncio.Future[Any]] = set()
        self._ended: asyncio.Future[Callable[[], Exception]] = asyncio.get_running_loop().create_future()
        for process in processes:
            asyncio.get_running_loop().add_reader(process.sentinel, self._end, _gone)

    @classmethod
    async def start(
        cls,
        path: str,
        *,
        stop_token_ids: Sequence[int],
        shapes: Mapping[str, tuple[int, ...]],
        limits: Limits,
        weight_update: WeightUpdate = "in_flight",
        device: str = "cpu",
        threads: int = 0,
        settings: Mapping[str, Any],
        merge: Merge | None = None,
    ) -> Self:
        """Load the model folder or hub name `path` into an engine process. Blocks the event loop meanwhile.

        `shapes` are the model's parameters, which published weights have to fit; with `merge` those are adapters.
        `threads` are for a CPU; 0 takes every core. `settings` are vLLM's own engine arguments. Raises ConfigError when
        vLLM is missing, was built for another device, or refuses a setting; ActorDied when the engine process ends
        while it starts.
        """
        check_installed()
        set_environment(device, threads)
        before = set(multiprocessing.active_children())
        llm = _start_llm(path, limits, device, settings)
        await llm.update_weight_version("0")
        processes = [child for child in multiprocessing.active_children() if child not in before]
        return cls(
            llm,
            processes,
            stop_token_ids=stop_token_ids,
            shapes=shapes,
            limits=limits,
            weight_update=weight_update,
            merge=merge,
            threads=threads,
        )

    async def generate(self, prompt_ids: Ints, params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions of one prompt [prompt length].

        Raises ValueError when they can't fit, ActorDied when the engine's process is gone.
        """
        self._raise_if_ended()
        self._limits.check(prompt_ids, params)
        greedy = params.temperature == 0
        samples = range(1 if greedy else params.n)
        with self._clock.busy():
            completions = await self._unless_ended(
                gather_or_cancel(*(self._completion(prompt_ids, params, sample) for sample in samples))
            )
        if greedy:
            completions *= params.n
        self._tokens += sum(len(completion.token_ids) for completion in completions)
        return completions

    async def update_weights(self, weights: Weights) -> None:
        """Swap weights between two decode steps; returns once they are in use.

        Raises WeightsError, with the old weights in use, when they don't fit or were damaged. After an update that
        fails later the engine answers no more: half of its weights may be new.
        """
        self._raise_if_ended()
        if self._merge is None:
            check_fit(self._shapes, weights)
        else:
            self._merge.check_fit(weights)
        update = asyncio.ensure_future(self._unless_ended(self._update(weights)))
        # Shielded: a caller that gives up must not leave the engine paused. Nobody hears of its error then.
        update.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(update)

    async def ping(self) -> None:
        """Returns when the engine's process answers, between two of its steps."""
        self._raise_if_ended()
        await self._unless_ended(self._llm.is_sleeping())

    def stats(self) -> GeneratorStats:
        return GeneratorStats(busy_s=self._clock.seconds, tokens=self._tokens)

    async def close(self) -> None:
        """Abort what is running and end the engine's processes."""
        if self._closed:
            return
        self._closed = True
        self._end(partial(RuntimeError, "the engine was closed"))
        for work in self._under_way:
            work.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        for process in self._processes:
            asyncio.get_running_loop().remove_reader(process.sentinel)
        await asyncio.to_thread(self._llm.shutdown, timeout=_SHUTDOWN_TIMEOUT_S)
        self._llm.shutdown = lambda: None  # vLLM's finalizer calls it again, and fails at the interpreter's end
        if self._memory is not None:
            self._memory.close()

    async def _completion(self, prompt_ids: Ints, params: SamplingParams, sample: int) -> Completion:
        from vllm.inputs import tokens_input

        async with self._places:
            await self._accepting.wait()
            prompt = tokens_input(np.asarray(prompt_ids).tolist(), cache_salt=str(self.version))
            settings = sampling_params(params, sample, self._stop_token_ids)
            [answer] = [each async for each in self._llm.generate(prompt, settings, str(next(self._request_ids)))]
        [output] = answer.outputs
        return as_completion(output)

    async def _update(self, weights: Weights) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        async with self._updating:  # up to the pause, generation goes on
            await asyncio.to_thread(check_intact, weights)
            if self._merge is not None:
                weights = await run_in_temp_thread(self._threads, self._merge, weights)
            memory = await self._shared_memory(weights.buffer.nbytes)
            await asyncio.to_thread(memory.write, weights.buffer)
            layout = [(s.name, list(s.shape), str(s.dtype).removeprefix("torch."), s.offset) for s in weights.specs]
            self._accepting.clear()
            try:
                await self._llm.pause_generation(**_PAUSE[self._weight_update])
                await self._load(layout, weights.version)
                await self._llm.resume_generation()
            except EngineDeadError:
                self._end(_gone)
                raise
            except BaseException:
                gone = any(not process.is_alive() for process in self._processes)
                failed = partial(RuntimeError, "the engine stopped: an update of its weights failed")
                self._end(_gone if gone else failed)
                raise
            self._accepting.set()

    async def _load(self, layout: Sequence[Any], version: int) -> None:
        """While generation pauses: have the workers take what lies in the shared memory."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest({"parameters": layout}))
        await self._llm.finish_weight_update(weight_version=str(version))
        self.version = version

    async def _shared_memory(self, size: int) -> SharedBuffer:
        """The memory that weights pass through, mapped by the workers at the first update."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        if self._memory is None:
            self._memory = SharedBuffer(size)
            request = WeightTransferInitRequest({"path": self._memory.path, "size": size})
            await self._llm.init_weight_transfer_engine(request)
        return self._memory

    async def _unless_ended(self, work: Coroutine[Any, Any, R]) -> R:
        """Await `work`, or cancel it and raise as soon as the engine ends: vLLM lets some calls wait for ever then."""
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(work)
        self._under_way.add(task)
        try:
            await asyncio.wait((task, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done() and (task.cancelled() or not task.done()):
                raise self._ended.result()()
            return task.result()
        except EngineDeadError as error:
            raise _gone() from error
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._under_way.discard(task)

    def _end(self, reason: Callable[[], Exception]) -> None:
        """From now on every call raises what `reason` makes."""
        if not self._ended.done():
            self._ended.set_result(reason)

    def _raise_if_ended(self) -> None:
        if self._closed:
            raise RuntimeError("the engine has stopped")
        if self._ended.done():
            raise self._ended.result()()


def _gone() -> ActorDied:
    return ActorDied("the engine process of vLLM is gone")


def _start_llm(path: str, limits: Limits, device: str, settings: Mapping[str, Any]) -> Any:
    """vLLM with the model in an engine process of its own. Raises what `VLLMEngine.start` does."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    if (built_for := current_platform.device_type) != device:
        raise ConfigError(f"this vLLM computes on {built_for}, not on {device}", key="generator.num_gpus")
    context = limits.max_prompt_tokens + limits.max_completion_tokens
    try:
        args = AsyncEngineArgs(
            model=path,
            skip_tokenizer_init=True,
            max_model_len=context,
            max_num_seqs=limits.max_sequences,
            logprobs_mode="processed_logprobs",  # of the distribution sampled from, temperature and filters applied
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            worker_extension_cls=f"{WORKER}.WorkerExtension",
            disable_log_stats=True,
            **{**(cpu_settings(context) if device == "cpu" else {}), **settings},
        )
        return AsyncLLM.from_engine_args(args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses it: {' '.join(str(error).split())}", key="generator.args") from error
    except RuntimeError as error:  # its engine process has ended; run.log has what that had to say
        raise ActorDied(f"vLLM's engine did not start: {' '.join(str(error).split())}") from error

"""vLLM as an engine, through its asynchronous interface (extra `vllm`).

    generator actor                         vLLM's engine process (with tensor parallelism: and its workers)
      generate        -- token ids -->        continuous batching over a paged KV cache
      update_weights  -- shared memory -->    worker.py: loads in place while generation is paused

Token ids go in; token ids and log-probabilities come out as they were sampled. Nothing is tokenized a second time.
"""

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

from grpo.engines.base import Limits, WeightUpdate, measure_prompt_tokens
from grpo.engines.vllm.params import (
    CacheSalts,
    as_completion,
    check_installed,
    cpu_settings,
    sampling_params,
    set_environment,
)
from grpo.errors import ActorDied, ConfigError
from grpo.types import Completion, GeneratorStats, Ints, SamplingParams
from grpo.utils.aio import cancel_and_wait, gather_or_cancel
from grpo.utils.torch_utils import BusyClock, run_in_temp_thread
from grpo.weights.adapters import Merge
from grpo.weights.payload import Weights, check_fit, check_intact

R = TypeVar("R")
BACKEND = "grpo_shared_memory"  # name under which the worker registers its weight transfer
_PAUSE: dict[WeightUpdate, dict[str, Any]] = {
    "in_flight": {"mode": "keep", "clear_cache": False},
    "in_flight_recompute": {"mode": "keep", "clear_cache": True},
    "drain": {"mode": "wait", "clear_cache": True},
}
_SHUTDOWN_TIMEOUT_S = 1.0


class VLLMEngine:
    """Engine on vLLM. Build it inside a running event loop, `start` it, and `close` it when done.

    `model` is a folder or a name on the hub. `shapes` are the model's parameters, which published weights have to fit;
    with `merge` published weights are adapters. `weight_update` is as in TorchEngine. `threads` applies to a CPU; 0
    means every core. `settings` are engine arguments of vLLM.

    vLLM is given no more requests than it has slots for, and none during an update, so it is known which weights a
    prompt is computed with. Cached prefixes are reused within a policy version, because the version salts the cache.
    (In flight, the later turns of an episode keep the salt of its first one, and a completion handed over just before a
    pause may still share a prefix that was computed before it.)
    """

    def __init__(
        self,
        model: str,
        *,
        stop_token_ids: Sequence[int],
        shapes: Mapping[str, tuple[int, ...]],
        limits: Limits,
        weight_update: WeightUpdate = "in_flight",
        device: str = "cpu",
        threads: int = 0,
        settings: Mapping[str, Any] | None = None,
        merge: Merge | None = None,
    ) -> None:
        self.version = 0
        self._model, self._device, self._threads, self._settings = model, device, threads, settings or {}
        self._shapes, self._limits, self._weight_update, self._merge = shapes, limits, weight_update, merge
        self._stop_token_ids = tuple(stop_token_ids)
        self._llm: Any = None
        self._processes: list[BaseProcess] = []
        self._buffer: SharedBuffer | None = None
        self._slots = asyncio.Semaphore(limits.max_sequences)
        self._salts = CacheSalts(weight_update)
        self._accepting = asyncio.Event()  # no update is running
        self._accepting.set()
        self._updating = asyncio.Lock()
        self._request_ids = count()
        self._clock = BusyClock()
        self._tokens = 0
        self._closed = False
        self._calls: set[asyncio.Future[Any]] = set()
        self._ended: asyncio.Future[Callable[[], Exception]] = asyncio.get_running_loop().create_future()

    async def start(self) -> Self:
        """Load the model into an engine process. Blocks the event loop meanwhile.

        Raises ConfigError when vLLM is missing, was built for another device, or rejects a setting; ActorDied when the
        engine process ends while it starts.
        """
        check_installed()
        set_environment(self._device, self._threads)
        before = set(multiprocessing.active_children())
        self._llm = self._start_llm()
        await self._llm.update_weight_version("0")
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        for process in self._processes:
            asyncio.get_running_loop().add_reader(process.sentinel, self._end, _process_died)
        return self

    async def generate(self, prompt_ids: Ints, params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions of one prompt [prompt length].

        Raises ValueError when they can't fit, ActorDied when the engine process has died.
        """
        self._raise_if_ended()
        self._limits.check(prompt_ids, params)
        greedy = params.temperature == 0
        samples = range(1 if greedy else params.n)
        with self._clock.busy():
            completions = await self._until_ended(
                gather_or_cancel(*(self._completion(prompt_ids, params, sample) for sample in samples))
            )
        if greedy:
            completions *= params.n
        self._tokens += sum(len(completion.token_ids) for completion in completions)
        return completions

    async def update_weights(self, weights: Weights) -> None:
        """Swap weights between two decode steps; return once they are in use.

        Raises WeightsError when they don't fit or were damaged; the old weights then stay in use. If an update fails
        later the engine stops, because half of its weights may be new.
        """
        self._raise_if_ended()
        if self._merge is None:
            check_fit(self._shapes, weights)
        else:
            self._merge.check_fit(weights)
        update = asyncio.ensure_future(self._until_ended(self._update(weights)))
        # Shielded: a cancelled caller must not leave the engine paused. Its error is then retrieved by this callback.
        update.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(update)

    async def ping(self) -> None:
        """Return when the engine process answers, between two of its steps."""
        self._raise_if_ended()
        await self._until_ended(self._llm.is_sleeping())

    def stats(self) -> GeneratorStats:
        return GeneratorStats(busy_s=self._clock.seconds, tokens=self._tokens)

    async def close(self) -> None:
        """Abort running requests and end the engine's processes."""
        if self._closed:
            return
        self._closed = True
        self._end(partial(RuntimeError, "the engine was closed"))
        await cancel_and_wait(self._calls)
        for process in self._processes:
            asyncio.get_running_loop().remove_reader(process.sentinel)
        await asyncio.to_thread(self._llm.shutdown, timeout=_SHUTDOWN_TIMEOUT_S)
        self._llm.shutdown = lambda: None  # vLLM's finalizer calls it again, and fails when the interpreter exits
        if self._buffer is not None:
            self._buffer.close()

    def _start_llm(self) -> Any:
        """Return vLLM with the model in a separate engine process. Raises the errors of `start`."""
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        if (built_for := current_platform.device_type) != self._device:
            raise ConfigError(
                f"vLLM is built for {built_for}, the generator runs on {self._device}", key="generator.num_gpus"
            )
        # vLLM reports rejected arguments as TypeError or ValueError, and a process that failed as RuntimeError.
        context = self._limits.context
        try:
            args = AsyncEngineArgs(
                model=self._model,
                skip_tokenizer_init=True,
                max_model_len=context,
                max_num_seqs=self._limits.max_sequences,
                logprobs_mode="processed_logprobs",  # of the distribution sampled from, temperature and filters applied
                weight_transfer_config=WeightTransferConfig(backend=BACKEND),
                worker_extension_cls="grpo.engines.vllm.worker.WorkerExtension",
                disable_log_stats=True,
                **{**(cpu_settings(context) if self._device == "cpu" else {}), **self._settings},
            )
            return AsyncLLM.from_engine_args(args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"rejected by vLLM: {' '.join(str(error).split())}", key="generator.args") from error
        except RuntimeError as error:  # its engine process has ended; the process's own error is in run.log
            raise ActorDied(f"vLLM's engine failed to start: {' '.join(str(error).split())}") from error

    async def _completion(self, prompt_ids: Ints, params: SamplingParams, sample: int) -> Completion:
        from vllm.inputs import tokens_input

        async with self._slots:
            await self._accepting.wait()
            salt = self._salts.of(params, sample, self.version)
            prompt = tokens_input(np.asarray(prompt_ids).tolist(), cache_salt=salt)
            settings = sampling_params(params, sample, self._stop_token_ids)
            [answer] = [each async for each in self._llm.generate(prompt, settings, str(next(self._request_ids)))]
        if (kept := answer.num_cached_tokens) is not None:
            measure_prompt_tokens(read=len(prompt_ids) - kept, kept=kept)
        [output] = answer.outputs
        return as_completion(output)

    async def _update(self, weights: Weights) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        async with self._updating:
            # Generation continues until the pause.
            await asyncio.to_thread(check_intact, weights)
            if self._merge is not None:
                weights = await run_in_temp_thread(self._threads, self._merge, weights)
            buffer = await self._shared_buffer(weights.buffer.nbytes)
            await asyncio.to_thread(buffer.write, weights.buffer)
            layout = [(s.name, list(s.shape), str(s.dtype).removeprefix("torch."), s.offset) for s in weights.specs]

            # After an error here the weights are in an unknown state, so the engine ends.
            self._accepting.clear()
            try:
                await self._llm.pause_generation(**_PAUSE[self._weight_update])
                await self._load(layout, weights.version)
                await self._llm.resume_generation()
            except EngineDeadError:
                self._end(_process_died)
                raise
            except BaseException:
                died = any(not process.is_alive() for process in self._processes)
                failed = partial(RuntimeError, "the engine has stopped: a weight update failed half-way")
                self._end(_process_died if died else failed)
                raise
            self._accepting.set()

    async def _shared_buffer(self, size: int) -> SharedBuffer:
        """Return the buffer for weights of `size` bytes; the workers map it at the first update."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        if self._buffer is None:
            self._buffer = SharedBuffer(size)
            request = WeightTransferInitRequest({"path": self._buffer.path, "size": size})
            await self._llm.init_weight_transfer_engine(request)
        return self._buffer

    async def _load(self, layout: Sequence[Any], version: int) -> None:
        """Make the workers load the contents of the shared buffer, while generation is paused."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest({"parameters": layout}))
        await self._llm.finish_weight_update(weight_version=str(version))
        self.version = version

    async def _until_ended(self, work: Coroutine[Any, Any, R]) -> R:
        """Await `work`, or cancel it and raise as soon as the engine ends: then some calls of vLLM never return."""
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(work)
        self._calls.add(task)
        try:
            await asyncio.wait((task, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done() and (task.cancelled() or not task.done()):
                raise self._ended.result()()
            return task.result()
        except EngineDeadError as error:
            raise _process_died() from error
        finally:
            await cancel_and_wait([task])
            self._calls.discard(task)

    def _end(self, reason: Callable[[], Exception]) -> None:
        """Make every running and later call raise the error that `reason` makes. The first reason stays."""
        if not self._ended.done():
            self._ended.set_result(reason)

    def _raise_if_ended(self) -> None:
        if self._closed:
            raise RuntimeError("the engine has stopped")
        if self._ended.done():
            raise self._ended.result()()


def _process_died() -> ActorDied:
    return ActorDied("vLLM's engine process has died")


class SharedBuffer:
    """File that exists only in memory (memfd): it leaves nothing behind, and has no size limit like /dev/shm.

    Another process of the same user maps `path` with `read_shared`. The memory is freed with the last mapping. Linux
    only.
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
    """Return a read-only view, uint8 [size], of a SharedBuffer of another process."""
    return np.memmap(path, dtype=np.uint8, mode="r", shape=(size,))

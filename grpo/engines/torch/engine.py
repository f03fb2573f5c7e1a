"""Torch engine: continuous batching over any Hugging Face causal LM with full or sliding attention.

Requests wait in arrival order. One task steps the batch in a separate thread. Between two steps it drops cancelled
requests, swaps in new weights, and lets rows of waiting groups take the slots of finished rows.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grpo.engines.base import Limits, WeightUpdate, measure_prompt_tokens
from grpo.engines.torch.batch import DecodeBatch, Request
from grpo.telemetry.recording import measure, span
from grpo.types import Completion, GeneratorStats, Ints, SamplingParams
from grpo.utils.torch_utils import ComputeThread, run_in_temp_thread
from grpo.weights.adapters import Merge
from grpo.weights.payload import StagedWeights, Weights, check_intact

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchEngine:
    """Engine on plain PyTorch. Build it inside a running event loop, and `close` it when done.

    `weight_update` decides the fate of running completions at a swap. `in_flight` keeps the keys and values computed
    with the old weights. `in_flight_recompute` recomputes them under the new weights. `drain` finishes the running
    groups under the old weights first, while new groups wait. With `merge`, published weights are adapters.
    `cuda_graphs` applies to models on a GPU that allow them. Up to `prefix_cache_mb` MiB of keys and values are kept
    between the turns of episodes; as those of running completions, they outlive a swap only `in_flight`.

    Example:

        limits = Limits(max_prompt_tokens=64, max_completion_tokens=256, max_sequences=32)
        engine = TorchEngine(model, stop_token_ids=[tokenizer.eos_token_id], limits=limits)
        completions = await engine.generate(prompt_ids, SamplingParams(n=8, max_tokens=256, seed=0))
        await engine.update_weights(weights)
        await engine.close()
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_token_ids: Sequence[int],
        limits: Limits,
        weight_update: WeightUpdate = "in_flight",
        cuda_graphs: bool = True,
        prefix_cache_mb: float = 1024.0,
        threads: int = 0,
        merge: Merge | None = None,
    ) -> None:
        self._batch = DecodeBatch(
            model,
            stop_token_ids=stop_token_ids,
            limits=limits,
            cuda_graphs=cuda_graphs,
            prefix_cache_bytes=int(prefix_cache_mb * 2**20),
        )
        self._limits, self._weight_update, self._merge = limits, weight_update, merge
        self._waiting: deque[Request] = deque()
        self._futures: dict[Request, asyncio.Future[list[Completion]]] = {}
        self._aborted: list[Request] = []
        self._updates: deque[tuple[int, StagedWeights, asyncio.Future[None]]] = deque()
        self._staging = asyncio.Lock()
        self._work = asyncio.Event()
        self._tokens = 0
        self._threads, self._thread = threads, ComputeThread("engine", threads)
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._fail_pending)

    @property
    def version(self) -> int:
        return self._batch.version

    async def generate(self, prompt_ids: Ints, params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions of one prompt [prompt length]; raises ValueError when they can't fit."""
        self._raise_if_stopped()
        self._limits.check(prompt_ids, params)
        request = Request(prompt_ids, params, time.perf_counter())
        self._waiting.append(request)
        self._futures[request] = asyncio.get_running_loop().create_future()
        self._work.set()
        try:
            return await self._futures[request]
        except asyncio.CancelledError:
            self._aborted.append(request)
            self._work.set()
            raise
        finally:
            del self._futures[request]

    async def update_weights(self, weights: Weights) -> None:
        """Swap weights between two decode steps; return once they are in use.

        Raises WeightsError when they don't fit or were damaged; the old weights then stay in use.
        """
        # One update at a time, so that versions come into use in the order of the calls. Generation continues
        # meanwhile: only the swap itself interrupts it.
        async with self._staging:
            await asyncio.to_thread(check_intact, weights)
            if self._merge is not None:
                weights = await run_in_temp_thread(self._threads, self._merge, weights)
            staged = await asyncio.to_thread(StagedWeights, self._batch.model, weights, part=self._merge is not None)
        loaded = asyncio.get_running_loop().create_future()
        self._updates.append((weights.version, staged, loaded))
        self._work.set()
        self._raise_if_stopped()
        await loaded

    async def ping(self) -> None:
        """In-process: always healthy."""

    def stats(self) -> GeneratorStats:
        return GeneratorStats(busy_s=self._thread.busy_s, tokens=self._tokens)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.close()

    async def _run(self) -> None:
        """Step the batch for as long as there is work.

        Consumes: waiting requests, cancelled requests and staged weights.
        Waits for: `_work`, when none of these is left and no row is running.
        Unblocked by: `generate`, the cancellation of a `generate` call, and `update_weights`.
        Ends when: `close` cancels it, or a step raises. `_fail_pending` then fails every pending call.
        """
        while True:
            await self._work.wait()
            self._work.clear()
            while self._waiting or self._batch.running or self._updates or self._aborted:
                await self._drop_aborted()
                await self._swap_weights()
                finished, tokens = await self._thread.run(self._batch.step, self._admit())
                # A group stays at the head of the queue until its last row has joined.
                while self._waiting and not self._waiting[0].to_join:
                    self._waiting.popleft()
                measure("generator/batch_size", self._batch.running)
                read, kept = self._batch.take_prompt_tokens()
                measure_prompt_tokens(read=read, kept=kept)
                self._tokens += tokens
                # A request that was cancelled during the step has no future any more, or a cancelled one.
                for request in finished:
                    if request in self._futures and not self._futures[request].done():
                        self._futures[request].set_result(request.result())

    async def _drop_aborted(self) -> None:
        for request in self._aborted:
            if request in self._waiting:
                self._waiting.remove(request)
            if request.joined:
                await self._thread.run(self._batch.abort, request)
        self._aborted.clear()

    async def _swap_weights(self) -> None:
        """Load the oldest pending update, unless a drain still waits for started groups to finish."""
        group_started = self._batch.running or (self._waiting and self._waiting[0].joined)
        if not self._updates or (self._weight_update == "drain" and group_started):
            return
        version, staged, loaded = self._updates[0]  # popped after loading, so that `_fail_pending` reaches its caller
        try:
            if not loaded.cancelled():
                await self._thread.run(self._swap, version, staged)
        except Exception as error:
            if not loaded.cancelled():
                loaded.set_exception(error)  # the caller decides; the old weights stay in use
        else:
            if not loaded.cancelled():
                loaded.set_result(None)
        self._updates.popleft()

    def _swap(self, version: int, staged: StagedWeights) -> None:
        with span("load", version=version):
            staged.swap()
        self._batch.version = version
        if self._weight_update != "in_flight":
            self._batch.prefixes.clear()
        if self._weight_update == "in_flight_recompute":
            self._batch.recompute()

    def _admit(self) -> list[Request]:
        """Pick the waiting groups, in order, of which at least one row fits now.

        While an update is pending no new group starts; the remaining rows of a started one still join.
        """
        joining: list[Request] = []
        free_rows = self._batch.free_rows
        for request in self._waiting:
            if free_rows <= 0 or (self._updates and not request.joined):
                break
            joining.append(request)
            free_rows -= request.to_join
            if not request.joined:
                measure("generator/queue_s", time.perf_counter() - request.arrived_s, "percentiles")
        return joining

    def _raise_if_stopped(self) -> None:
        if self._task.done():
            raise RuntimeError("the engine has stopped") from _failure(self._task)

    def _fail_pending(self, task: asyncio.Task[None]) -> None:
        """Fail every pending call once the stepping task has ended."""
        error = _failure(task) or RuntimeError("the engine was closed")
        pending: list[asyncio.Future[Any]] = [*self._futures.values(), *(loaded for *_, loaded in self._updates)]
        for future in pending:
            if not future.done():
                future.set_exception(error)


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()

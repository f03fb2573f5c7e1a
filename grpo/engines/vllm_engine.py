"""vLLM as the engine, through its asynchronous interface (extra `vllm`).

    generator actor                         vLLM's engine process (with tensor parallelism: and its workers)
      generate        -- token ids -->        continuous batching over a paged KV cache
      update_weights  -- shared memory -->    vllm_worker.py: loaded in place while generation pauses

Token ids go in, token ids and log-probabilities come out as they were sampled: nothing is tokenized a second time.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Self

import numpy as np

from grpo.compute import BusyClock
from grpo.engines.base import Limits, WeightUpdate
from grpo.engines.shared_buffer import SharedBuffer
from grpo.types import ActorDied, Completion, ConfigError, GeneratorStats, Ints, SamplingParams
from grpo.weights import Weights, check_fit

WORKER = "grpo.engines.vllm_worker"
BACKEND = "grpo_shared_memory"  # the name under which the worker registers how weights come in

_PAUSE: dict[WeightUpdate, dict[str, Any]] = {
    "in_flight": {"mode": "keep", "clear_cache": False},
    "in_flight_recompute": {"mode": "keep", "clear_cache": True},
    "drain": {"mode": "wait", "clear_cache": True},
}
_SHUTDOWN_TIMEOUT_S = 1.0


class VLLMEngine:
    """Made by `start`; `close` it when done. `weight_update` as in TorchEngine.

    A new prompt never reuses the cached prefix of older weights: the policy version salts the prefix cache.
    """

    def __init__(
        self,
        llm: Any,
        *,
        stop_token_ids: Sequence[int],
        shapes: Mapping[str, tuple[int, ...]],
        limits: Limits,
        weight_update: WeightUpdate,
    ) -> None:
        self.version = 0
        self._llm, self._shapes, self._limits, self._weight_update = llm, shapes, limits, weight_update
        self._stop_token_ids = tuple(stop_token_ids)
        self._memory: SharedBuffer | None = None
        self._updating = asyncio.Lock()
        self._closed = False
        self._calls: set[asyncio.Task[Any]] = set()
        self._request_ids = count()
        self._clock = BusyClock()
        self._tokens = 0

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
        **settings: Any,
    ) -> Self:
        """Load the model folder or hub name `path` into an engine process. Blocks the event loop meanwhile.

        `shapes` are the model's parameters, which published weights have to fit. `threads` are for a CPU; 0 takes
        every core. `settings` are vLLM's own engine arguments. Raises ConfigError when vLLM is missing or refuses
        a setting.
        """
        check_installed()
        _set_environment(device, threads)
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        context = limits.max_prompt_tokens + limits.max_completion_tokens
        if device == "cpu":
            settings = _cpu_settings(context) | settings
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
                **settings,
            )
            llm = AsyncLLM.from_engine_args(args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"vLLM refuses it: {' '.join(str(error).split())}", key="generator.args") from error
        await llm.update_weight_version("0")
        return cls(llm, stop_token_ids=stop_token_ids, shapes=shapes, limits=limits, weight_update=weight_update)

    async def generate(self, prompt_ids: Ints, params: SamplingParams) -> list[Completion]:
        """Sample `params.n` completions of one prompt [prompt length].

        Raises ValueError when they can't fit, ActorDied when the engine's process is gone.
        """
        self._raise_if_closed()
        self._limits.check(prompt_ids, params)
        call = asyncio.create_task(self._answer(prompt_ids, params))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            with self._clock.busy():
                answer = await call
        except asyncio.CancelledError:
            if self._closed and not _cancelling():
                raise RuntimeError("the engine was closed") from None
            raise
        completions = [_completion(output) for output in sorted(answer.outputs, key=lambda output: output.index)]
        if params.temperature == 0:
            completions *= params.n
        self._tokens += sum(len(completion.token_ids) for completion in completions)
        return completions

    async def update_weights(self, weights: Weights) -> None:
        """Swap weights between two decode steps; returns once they are in use.

        Raises WeightsError, with the old weights in use, when they don't fit. An update that fails later leaves the
        engine closed: half of its weights may be new.
        """
        self._raise_if_closed()
        check_fit(self._shapes, weights)
        # Shielded: a caller that gives up must not leave the engine paused.
        await asyncio.shield(asyncio.create_task(self._update(weights)))

    def stats(self) -> GeneratorStats:
        return GeneratorStats(busy_s=self._clock.seconds, tokens=self._tokens)

    async def close(self) -> None:
        """Abort what is running and end the engine's processes."""
        if self._closed:
            return
        self._closed = True
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.to_thread(self._llm.shutdown, timeout=_SHUTDOWN_TIMEOUT_S)
        self._llm.shutdown = lambda: None  # vLLM's finalizer calls it again, and fails at the interpreter's end
        if self._memory is not None:
            self._memory.close()

    async def _answer(self, prompt_ids: Ints, params: SamplingParams) -> Any:
        """vLLM's one, final output for a request."""
        from vllm.inputs import tokens_input

        prompt = tokens_input(np.asarray(prompt_ids).tolist(), cache_salt=str(self.version))
        outputs = self._llm.generate(
            prompt, _sampling_params(params, self._stop_token_ids), str(next(self._request_ids))
        )
        with _death_named():
            [answer] = [output async for output in outputs]
        return answer

    async def _update(self, weights: Weights) -> None:
        layout = [(s.name, list(s.shape), str(s.dtype).removeprefix("torch."), s.offset) for s in weights.specs]
        async with self._updating:
            with _death_named():
                memory = await self._shared_memory(weights.buffer.nbytes)
                await asyncio.to_thread(memory.write, weights.buffer)  # generation goes on during this copy
                await self._llm.pause_generation(**_PAUSE[self._weight_update])
                try:
                    await self._load(layout, weights.version)
                except BaseException:
                    await self.close()
                    raise

    async def _load(self, layout: Sequence[Any], version: int) -> None:
        """While generation pauses: have the workers take what lies in the shared memory."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest({"parameters": layout}))
        await self._llm.finish_weight_update(weight_version=str(version))
        self.version = version
        await self._llm.resume_generation()

    async def _shared_memory(self, size: int) -> SharedBuffer:
        """The memory that weights pass through, mapped by the workers at the first update."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        if self._memory is None:
            self._memory = SharedBuffer(size)
            request = WeightTransferInitRequest({"path": self._memory.path, "size": size})
            await self._llm.init_weight_transfer_engine(request)
        return self._memory

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("the engine has stopped")


def _cpu_settings(context: int) -> dict[str, Any]:
    """A prompt is read whole: read in parts, a seeded request kills the engine, whose CPU generators can't go back."""
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context, 4096),
    }


def check_installed() -> None:
    """Raise ConfigError, with the line to type, when vLLM is not there."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vllm is not installed: pip install 'grpo[vllm]', or use torch", key="generator.engine")


def _sampling_params(params: SamplingParams, stop_token_ids: tuple[int, ...]) -> Any:
    from vllm import SamplingParams as VLLMParams
    from vllm.sampling_params import RequestOutputKind

    greedy = params.temperature == 0
    return VLLMParams(
        n=1 if greedy else params.n,  # vLLM refuses several greedy ones, which would be equal
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_tokens,
        stop_token_ids=[*stop_token_ids, *params.stop_token_ids],
        ignore_eos=True,  # our list is the whole one
        seed=None if greedy else _seed(params.seed),
        logprobs=0,  # of the sampled token alone
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any) -> Completion:
    logprobs = [at[token_id].logprob for at, token_id in zip(output.logprobs, output.token_ids, strict=True)]
    return Completion(
        token_ids=np.array(output.token_ids, dtype=np.int64),
        logprobs=np.array(logprobs, dtype=np.float32),
        versions=tuple((int(span.version), span.end - span.start) for span in output.weight_versions),
        finish_reason="stop" if output.finish_reason == "stop" else "length",
    )


def _seed(seed: int) -> int:
    """vLLM seeds sample i of a group with seed + i; spread out, so that neighbouring prompts don't share numbers."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=6).digest(), "big")


@contextmanager
def _death_named() -> Iterator[None]:
    """Raise ActorDied for a call that vLLM's processes did not survive."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise ActorDied("the engine process of vLLM is gone") from error


def _cancelling() -> bool:
    """Whether it is the calling task itself that is being cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _set_environment(device: str, threads: int) -> None:
    """What vLLM only takes from the environment; it is read when vLLM is imported and by its processes."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork would copy locks that other threads hold
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = str(threads or os.cpu_count() or 1)  # Ray sets 1
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # bound, all replicas would share one core
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the worker in the engine's process: faster
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

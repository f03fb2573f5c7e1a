"""Generator actor: sample completions with an engine. One replica of the generator service."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import torch

from grpo.actors.marks import batched, replayed_on_join, returns_payload
from grpo.config.schema import RunConfig
from grpo.engines.base import Engine, Limits
from grpo.engines.simulated import SimulatedEngine
from grpo.engines.torch.engine import TorchEngine
from grpo.engines.vllm.engine import VLLMEngine
from grpo.models.loading import load_model, load_skeleton, stop_token_ids
from grpo.models.tokenizer import load_tokenizer
from grpo.telemetry.recording import span
from grpo.types import Completion, GenerationReport, GeneratorStats, Ints, Prompt, SamplingParams, generation_report
from grpo.utils.imports import check_arguments
from grpo.utils.torch_utils import run_in_temp_thread
from grpo.weights.adapters import Merge, base_of
from grpo.weights.broadcast import Broadcaster, BroadcastGroup
from grpo.weights.payload import Weights, WeightsHeader, parameter_shapes


class Generator:
    """Host one engine. Calls of `generate` run concurrently, and `update_weights` does not queue behind them."""

    def __init__(self, config: RunConfig, *, device: str = "cpu", threads: int = 0) -> None:
        self._config, self._device, self._threads = config, device, threads
        self._name = uuid.uuid4().hex
        self._broadcaster = Broadcaster()

    async def setup(self) -> None:
        self._engine = await make_engine(self._config, self._device, self._threads)

    @returns_payload
    async def generate(self, prompt: Prompt, params: SamplingParams) -> tuple[list[Completion], GenerationReport]:
        """Sample the group of `params.n` completions of one prompt."""
        completions = await self._engine.generate(prompt.token_ids, params)
        return completions, generation_report(completions)

    @batched
    async def sample(self, prompt_ids: Ints, params: SamplingParams) -> list[Completion]:
        """Sample the next turn of episodes: `params.n` completions of one prompt [prompt length]."""
        return await self._engine.generate(prompt_ids, params)

    @replayed_on_join
    async def update_weights(self, weights: Weights) -> GeneratorStats:
        """Return the counters so far, once every further token is sampled under `weights`."""
        await self._engine.update_weights(weights)
        return replace(self._engine.stats(), process=self._name)

    async def receive_weights(self, header: WeightsHeader, group: BroadcastGroup) -> GeneratorStats:
        """Receive weights that the trainer broadcasts to the group, then `update_weights`. Raises TransferError."""
        with span("receive", version=header.version):
            weights = await self._broadcaster.receive(group, header)
        return await self.update_weights(weights)

    async def leave_group(self, number: int) -> None:
        """Leave broadcast group `number`: running and later transfers in it raise TransferError."""
        self._broadcaster.leave(number)

    async def ping(self) -> None:
        """Return when the engine answers; it may run in a separate process."""
        await self._engine.ping()

    async def close(self) -> None:
        self._broadcaster.leave()
        if hasattr(self, "_engine"):  # else `setup` was not done: an engine that starts ends with the process
            await self._engine.close()


async def make_engine(config: RunConfig, device: str, threads: int) -> Engine:
    """Build the engine that `generator.engine` names."""
    settings = config.generator
    if settings.engine == "simulated":
        check_arguments(SimulatedEngine, settings.args, key="generator.args")
        return SimulatedEngine(**settings.args)
    limits = Limits(
        config.rollout.max_prompt_tokens,
        config.rollout.max_completion_tokens,
        settings.max_sequences,
        several_turns=config.uses_environment,
    )
    tokenizer = load_tokenizer(config.model)

    # vLLM loads the model itself; with adapters the base is also needed here, to merge them into it.
    merge = None
    if settings.engine == "torch" or config.uses_adapters:
        dtype = getattr(torch, config.model.dtype)
        model = await run_in_temp_thread(threads, load_model, config.model, dtype, "cpu")
        merge = Merge(base_of(model), config.lora.scale) if config.uses_adapters else None

    if settings.engine == "vllm":
        skeleton = load_skeleton(config.model)
        engine = VLLMEngine(
            str(config.model.path),
            stop_token_ids=stop_token_ids(skeleton, tokenizer),
            shapes=parameter_shapes(skeleton),
            limits=limits,
            weight_update=settings.weight_update,
            device=device,
            threads=threads,
            settings=_vllm_settings(config),
            merge=merge,
        )
        return await engine.start()
    return TorchEngine(
        model.to(device),
        stop_token_ids=stop_token_ids(model, tokenizer),
        limits=limits,
        weight_update=settings.weight_update,
        cuda_graphs=settings.cuda_graphs,
        prefix_cache_mb=settings.prefix_cache_mb,
        threads=threads,
        merge=merge,
    )


def _vllm_settings(config: RunConfig) -> dict[str, Any]:
    """Return engine arguments of vLLM; `generator.args` come last and win."""
    return {
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "load_format": "auto" if config.model.allow_pickle else "safetensors",
        "tensor_parallel_size": config.generator.tensor_parallel,
        "enforce_eager": not config.generator.cuda_graphs,
        "gpu_memory_utilization": config.generator.gpu_memory_fraction,
        # vLLM must not ask Ray for workers: this actor has the GPUs.
        "distributed_executor_backend": "mp" if config.generator.tensor_parallel > 1 else None,
        **config.generator.args,
    }

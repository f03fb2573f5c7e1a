"""Convert settings, sampling parameters and outputs to and from vLLM."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections import OrderedDict
from typing import Any

import numpy as np

from grpo.engines.base import WeightUpdate
from grpo.errors import ConfigError
from grpo.types import Completion, SamplingParams

_MOST_EPISODES = 100_000  # whose first versions are remembered: some megabytes


def check_installed() -> None:
    """Raise ConfigError, with the command that installs it, when vLLM is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vllm is not installed: pip install -e '.[vllm]', or use torch", key="generator.engine")


def set_environment(device: str, threads: int) -> None:
    """Set the options that vLLM only reads from the environment, on import and in its processes."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork would copy locks that other threads hold
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = str(threads or os.cpu_count() or 1)  # Ray sets 1
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # bound, all replicas would share one core
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the worker in the engine's process: faster
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def cpu_settings(context: int) -> dict[str, Any]:
    """Return engine arguments for a CPU and `context` tokens.

    Without chunked prefill: a chunk of a seeded request kills the engine, because the random generators of a CPU can't
    go back.
    """
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context, 4096),
    }


def sampling_params(params: SamplingParams, sample: int, stop_token_ids: tuple[int, ...]) -> Any:
    """Return vLLM's sampling parameters for one completion, number `sample` of its group."""
    from vllm import SamplingParams as VLLMParams
    from vllm.sampling_params import RequestOutputKind

    # One seed for each turn of a completion, of 48 bits: the generator of every device accepts these.
    source = f"{params.seed}/{params.first_sample + sample}" + (f"/{params.first_token}" if params.first_token else "")
    seed = hashlib.blake2b(source.encode(), digest_size=6).digest()
    return VLLMParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_tokens,
        stop_token_ids=[*stop_token_ids, *params.stop_token_ids],
        ignore_eos=True,  # `stop_token_ids` is complete
        seed=None if params.temperature == 0 else int.from_bytes(seed, "big"),
        logprobs=0,  # of the sampled token only
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class CacheSalts:
    """Chooses the salt of vLLM's prefix cache for each request: prefixes are shared among requests of the same salt.

    It is the version of the weights. The turns of an episode keep the version of the first one if `weight_update` is
    in_flight: as with a completion under way, what was computed before an update stays in use.

    Example:
        salts = CacheSalts("in_flight")
        salts.of(SamplingParams(seed=7, keep_prefix=True), 0, version=3)                  # "3"
        salts.of(SamplingParams(seed=7, first_token=20, keep_prefix=True), 0, version=4)  # "3": a later turn
    """

    def __init__(self, weight_update: WeightUpdate) -> None:
        self._in_flight = weight_update == "in_flight"
        self._first_versions: OrderedDict[tuple[int, int], int] = OrderedDict()

    def of(self, params: SamplingParams, sample: int, version: int) -> str:
        """Return the salt for completion number `sample` of a request that begins under these weights."""
        if not self._in_flight or not (params.keep_prefix or params.first_token):
            return str(version)
        # The first turn of a greedy group is asked for once, for all of its episodes.
        episode = params.seed, 0 if params.temperature == 0 else params.first_sample + sample
        first = self._first_versions.pop(episode, version) if params.first_token else version
        self._first_versions[episode] = first
        if len(self._first_versions) > _MOST_EPISODES:
            self._first_versions.popitem(last=False)
        return str(first)


def as_completion(output: Any) -> Completion:
    """Convert an output of vLLM. Raises RuntimeError if the completion ended for another reason than stop or length."""
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion with {output.finish_reason!r}")
    logprobs = [at[token_id].logprob for at, token_id in zip(output.logprobs, output.token_ids, strict=True)]
    return Completion(
        token_ids=np.array(output.token_ids, dtype=np.int64),
        logprobs=np.array(logprobs, dtype=np.float32),
        versions=tuple((int(span.version), span.end - span.start) for span in output.weight_versions),
        finish_reason=output.finish_reason,
    )

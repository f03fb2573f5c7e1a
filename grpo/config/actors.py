"""Settings of the model and of the actors that compute with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from grpo.config.fields import FiniteFloat, Form, Fraction, Hint, PositiveFloat, Settings

NumCpus = Annotated[float, Ge(0), Hint("0 reserves nothing")]
NumGpus = Annotated[float, Ge(0), Hint("0 reserves nothing")]
Threads = Annotated[int, Ge(0), Hint("0 takes as many as num_cpus")]
MicroBatchTokens = Annotated[int, Ge(1), Hint("a longer sequence makes a micro-batch of its own")]


def _are_betas(betas: list[float]) -> bool:
    return len(betas) == 2 and all(0 <= beta < 1 for beta in betas)


def _are_target_modules(value: Any) -> bool:
    listed = isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
    return value == "all-linear" or bool(listed)


@dataclass
class ModelConfig(Settings):
    """The model that is trained. Every actor loads it from `path`."""

    path: str | None = None
    """Hugging Face folder or hub name."""

    builder: str | None = None
    """Alternative to `path`: `module:function` that writes the model's folder; called with the task and `args`."""

    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of `builder`."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of generators, reference and published weights; with lora.rank also of the trainer's base weights."""

    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention of transformers, for everything but vLLM. sdpa uses FlashAttention kernels on GPUs."""

    trust_remote_code: bool = False
    """Run model code from the hub."""

    allow_pickle: bool = False
    """Load pytorch_model.bin where there are no safetensors (tensors only, no code)."""


@dataclass
class LoraConfig(Settings):
    """Low-rank adapters. With a rank, only adapters are trained and published. Needs peft (extra `lora`)."""

    rank: Annotated[int, Ge(0), Hint("0 trains all weights")] = 0
    """Rank (R): a matrix [O, I] gets A [R, I] and B [O, R]; 0 trains all weights."""

    alpha: PositiveFloat = 32.0
    """Scale: the model computes with W + alpha / rank * B A."""

    dropout: Annotated[float, Ge(0), Lt(1), Hint("0 switches it off")] = 0.0
    """Dropout on the input of A, in the trainer."""

    target_modules: Annotated[
        Any, Form(_are_target_modules, "all-linear or a list of module names like [q_proj, v_proj]")
    ] = "all-linear"
    """Layers with adapters. all-linear: every linear layer except the output head; or a list of module names."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass
class TrainerConfig(Settings):
    """The optimizer and its steps."""

    max_steps: Annotated[int, Ge(1), Hint("a run has at least one step")] = 100
    """Train steps of the run."""

    groups_per_step: Annotated[int, Ge(1), Hint("a train step takes at least one group")] = 16
    """Groups in the batch of a train step (P)."""

    updates_per_batch: Annotated[int, Ge(1), Hint("1 makes one optimizer step per batch")] = 1
    """Optimizer steps per batch, each on its share of the groups."""

    lr: Annotated[float, Ge(0), Hint("a learning rate is not negative")] = 1e-6
    """Learning rate after warmup."""

    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warmup: constant, or decayed to 0 at max_steps."""

    warmup_steps: Annotated[int, Ge(0), Hint("0 starts at the full learning rate")] = 0
    """Steps over which the learning rate rises linearly."""

    betas: Annotated[list[float], Form(_are_betas, "two numbers in [0, 1)")] = field(
        default_factory=lambda: [0.9, 0.95]
    )
    """Decay rates of Adam's two moments."""

    weight_decay: Annotated[float, Ge(0), Hint("0 switches it off")] = 0.0
    """Decoupled weight decay of AdamW."""

    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""

    max_nonfinite_steps: Annotated[int, Ge(0), Hint("0 ends the run at the first one")] = 10
    """Consecutive updates skipped for a loss or gradient that is not finite; one more ends the run."""

    packing: Literal["auto", "never"] = "auto"
    """auto: rows without padding and the prompt once per group, where the model allows; never: padded rows."""

    micro_batch_tokens: MicroBatchTokens = 16384
    """Tokens in one forward and backward pass, including padding."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""

    compile: bool = False
    """Compile the layers with torch.compile: slow first steps, less time outside of matrix products."""

    snapshot_every: Annotated[int, Ge(0), Hint("0 keeps none: a trainer that dies ends the run")] = 1
    """Steps between in-memory copies of the trainer's state, from which a replacement starts; 0: none."""

    ranks: Annotated[int, Ge(1), Hint("1 trains in one process")] = 1
    """Processes that share the model's state and the batch. Each one gets the resources below."""

    num_cpus: NumCpus = 1.0
    """CPU cores that Ray reserves for each rank."""

    num_gpus: NumGpus = 0.0
    """GPUs that Ray reserves for each rank: 0, 1 or a fraction."""

    threads: Threads = 0
    """Threads of CPU arithmetic; 0: as many as num_cpus."""


@dataclass
class WeightSyncConfig(Settings):
    """Transfer of new weights from the trainer to the generators."""

    transport: Literal["object_store", "collective"] = "object_store"
    """object_store: Ray's object store, on any cluster; collective: a broadcast of torch.distributed."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Backend of the broadcast. gloo: between CPUs; nccl: between whole GPUs; auto: nccl where it can be used."""

    bucket_mb: PositiveFloat = 32.0
    """MiB that are sent at a time."""

    timeout_s: PositiveFloat = 60.0
    """Seconds that a bucket, or the rendezvous, may take before the object store is used instead."""


@dataclass
class GeneratorConfig(Settings):
    """The engine that samples completions, and its replicas."""

    engine: Literal["torch", "vllm", "simulated"] = "torch"
    """Engine that samples completions."""

    replicas: Annotated[int, Ge(1), Hint("at least one replica is needed")] = 1
    """Generator actors that the run starts with."""

    max_replicas: int | None = None
    """Upper bound on generators, for replicas added when the cluster has room, now or later; null: `replicas`."""

    weight_update: Literal["in_flight", "in_flight_recompute", "drain"] = "in_flight"
    """When new weights are loaded. in_flight: between two tokens, keeping the KV cache; in_flight_recompute: the same,
    recomputing the KV cache; drain: after the completions under way."""

    max_sequences: int = 256
    """Completions that one replica decodes together."""

    cuda_graphs: bool = True
    """Use CUDA graphs for decode steps, where the model allows; false is vLLM's enforce_eager."""

    prefix_cache_mb: Annotated[float, Ge(0), Form(math.isfinite, "a finite number"), Hint("0 switches it off")] = 1024.0
    """MiB of keys and values that the torch engine keeps between the turns of episodes, beside the running ones."""

    num_cpus: NumCpus = 1.0
    """CPU cores that Ray reserves for each replica."""

    num_gpus: NumGpus = 0.0
    """GPUs that Ray reserves for each replica."""

    threads: Threads = 0
    """Threads of CPU arithmetic; 0: as many as num_cpus."""

    tensor_parallel: Annotated[int, Ge(1), Hint("1 keeps a replica on one GPU")] = 1
    """GPUs over which one replica of the vllm engine shards its model."""

    gpu_memory_fraction: Annotated[Fraction, Hint("fraction of each GPU's memory")] = 0.85
    """Fraction of each GPU's memory for the vllm engine's weights and KV cache."""

    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the vllm or the simulated engine."""


@dataclass
class ReferenceConfig(Settings):
    """The frozen model of the KL term. It is started only when loss.beta > 0 and lora.rank is 0."""

    replicas: Annotated[int, Ge(1), Hint("set loss.beta=0 to do without a reference")] = 1
    """Reference actors."""

    micro_batch_tokens: MicroBatchTokens = 16384
    """Tokens in one forward pass, including padding."""

    num_cpus: NumCpus = 0.0
    """CPU cores that Ray reserves for each replica."""

    num_gpus: NumGpus = 0.0
    """GPUs that Ray reserves for each replica: 0, 1 or a fraction."""

    threads: Threads = 0
    """Threads of CPU arithmetic; 0: as many as num_cpus."""


@dataclass
class EvalConfig(Settings):
    """Evaluation on held-out prompts at the start, every `every` steps, and at the end of a run."""

    prompts: Annotated[int, Ge(0), Hint("0 switches evaluation off")] = 0
    """Held-out prompts to evaluate on; 0: no evaluation."""

    every: Annotated[int, Ge(0), Hint("0 evaluates only at the start and at the end")] = 0
    """Steps between evaluations; 0: only at the start and at the end."""

    samples: Annotated[int, Ge(1), Hint("every prompt is answered at least once")] = 1
    """Completions per prompt; pass@k is estimated for every power of two k up to this."""

    temperature: Annotated[float, Ge(0), Form(math.isfinite, "a finite number"), Hint("0 is greedy")] | None = None
    """Sampling temperature; 0 is greedy, null is rollout.temperature."""

    success_threshold: FiniteFloat = 1.0
    """Smallest reward of a completion that counts as solved."""

    replicas: Annotated[int, Ge(0), Hint("0 uses the training's generators")] = 1
    """Generators for evaluation when `every` is set; 0: use the training's, which pauses meanwhile."""

    num_cpus: NumCpus = 1.0
    """CPU cores that Ray reserves for each replica."""

    num_gpus: NumGpus = 0.0
    """GPUs that Ray reserves for each replica."""

    threads: Threads = 0
    """Threads of CPU arithmetic; 0: as many as num_cpus."""

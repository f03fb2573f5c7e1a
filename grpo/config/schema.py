"""Every setting, one dataclass per config group. `configs/` holds the values; the types and the meanings are here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """The model that is trained: every actor loads it from `path`."""

    path: str | None = None  # a Hugging Face folder or hub name
    builder: str | None = None  # or `module:function` that makes the folder, called with the task and `args`
    args: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"  # of generators, reference and published weights; with lora.rank, of the trainer's base
    attention: str = "auto"  # transformers' for all but vLLM: sdpa, with FlashAttention's kernels on GPUs; eager; auto
    trust_remote_code: bool = False
    allow_pickle: bool = False  # where there are no safetensors, load pytorch_model.bin (tensors only, no code)


@dataclass
class LoraConfig:
    """Low-rank adapters: with a rank, they are all that is trained and published. Needs peft (extra `lora`)."""

    rank: int = 0  # R of a matrix [O, I], which gets A [R, I] and B [O, R]; 0: all weights are trained
    alpha: float = 32.0  # the model computes with W + alpha / rank * B A
    dropout: float = 0.0  # of what A is given, in the trainer
    target_modules: Any = "all-linear"  # every linear layer but the output head; or a list: [q_proj, v_proj]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass
class TaskConfig:
    """Prompts and scoring."""

    target: str = "???"  # `module:Class`, called with `args`; question marks: must be given
    args: dict[str, Any] = field(default_factory=dict)
    path: str | None = None  # a file to read the problems from, for tasks that take one
    template: str = "plain"  # plain: the question as it is; chat: the tokenizer's chat template
    system_prompt: str | None = None  # with template=chat; null: the template's own, where it has one


@dataclass
class DataloaderConfig:
    """Which prompts are trained on."""

    sampling: str = "uniform"  # uniform; difficulty: without problems that the last group solved always, or never
    revisit_fraction: float = 0.1  # with difficulty: the share of their turns that such problems keep


@dataclass
class RolloutConfig:
    """How groups are made."""

    concurrency: int | str = 32  # continuous_rollouts coroutines; auto: as many as the trainer needs
    target_trainer_idle: float = (
        0.1  # with auto: the share of its time that the trainer may wait, see grpo/driver/pacing.py
    )
    group_size: int = 8  # G
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_prompt_tokens: int = 512
    max_completion_tokens: int = 512


@dataclass
class RewardConfig:
    """What a completion earns: the weighted sum of reward functions."""

    functions: dict[str, float] = field(default_factory=lambda: {"task": 1.0})  # name or `module.function` -> weight
    on_error: str = "fail"  # fail: end the run; drop: drop the group and count it
    timeout_s: float = 60.0  # for one group; the process that takes longer is killed
    memory_gb: float = 2.0  # that a process may take beyond what it starts with; 0: no limit
    workers: int = 2  # processes of one replica, a group at a time each; more where rewards wait for a judge
    replicas: int = 1
    num_cpus: float = 0.0


@dataclass
class LossConfig:
    """The loss and the advantages; see grpo/algorithms. Parameters of the loss itself may be written without `args`."""

    name: str = "grpo"
    """One of LOSSES in grpo/algorithms/losses.py, or `module:Class` for a PolicyLoss of your own."""
    advantages: str = "group_norm"
    """One of ADVANTAGES in grpo/algorithms/advantages.py, or `module:function`."""
    aggregation: str | None = None
    """token_mean, sequence_mean, fixed_horizon; null: the loss's own."""
    horizon: int | None = None
    """Tokens that fixed_horizon divides by; null: the longest completion of the batch."""
    beta: float = 0.0
    """Weight of the KL term to the model before training; 0: no reference."""
    kl_estimator: str = "k3"
    """Estimator of the KL term: k1, k2, k3."""
    args: dict[str, Any] = field(default_factory=dict)
    """Parameters of the loss by name, like clip_low; one that is left out has the loss's own default."""


@dataclass
class CorrectionConfig:
    """Importance weights for off-policy samples; see grpo/algorithms/corrections.py, and configs/correction."""

    mode: str = "none"  # none: the loss's ratio is to the policy that sampled; truncate, mask: to the proximal one
    level: str = "token"  # token, sequence, geometric
    min_ratio: float = 0.0
    max_ratio: float | None = None  # null: no bound


@dataclass
class ShapingConfig:
    """What becomes of a reward before the advantages: scaled, clipped, and less for long answers."""

    scale: float = 1.0
    clip_low: float | None = None  # after scaling; null: no bound
    clip_high: float | None = None
    length_penalty: float = 0.0  # taken off an answer of max_completion_tokens, of shorter ones in proportion
    overlong: str = "keep"  # answers cut off at the limit. mask: not trained on; penalize: see overlong_buffer
    overlong_buffer: float = 0.0  # with penalize: that last part of max_completion_tokens costs more and more
    overlong_penalty: float = 1.0  # up to so much


@dataclass
class FilterConfig:
    """Groups that are dropped before they reach the trainer."""

    zero_variance: bool = False  # those with nothing to learn from; others are made in their place
    max_dropped_batches: int = (
        20  # so many batches' worth may be dropped while one batch's worth passes; more ends the run
    )


@dataclass
class BufferConfig:
    """Staleness: a group is at most this many versions older than the trainer when it is trained on."""

    max_policy_age: int = 1  # S; 0 is synchronous GRPO
    reorder_window: int = (
        1  # W: finished groups may overtake a straggler by W - 1 places; age bound S + ceil((W - 1) / P)
    )


@dataclass
class WeightSyncConfig:
    """How new weights get from the trainer to the generators."""

    transport: str = "object_store"  # Ray's, on any cluster; collective: a broadcast of torch.distributed
    backend: str = "auto"  # of the broadcast. gloo: between CPUs; nccl: between GPUs, where they have whole ones; auto
    bucket_mb: float = 32.0  # megabytes that travel at a time
    timeout_s: float = 60.0  # how long a bucket may take, or the processes to meet; then the object store is taken


@dataclass
class TrainerConfig:
    """The optimizer and its steps."""

    max_steps: int = 100
    groups_per_step: int = 16  # P
    updates_per_batch: int = 1  # optimizer steps over a batch, each on its share of the groups
    lr: float = 1e-6
    lr_schedule: str = "constant"  # constant, linear, cosine
    warmup_steps: int = 0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_nonfinite_steps: int = 10  # updates skipped in a row, loss or gradient not finite; one more ends the run
    packing: str = "auto"  # auto: rows without padding, prompts once for their group, where the model allows; never
    micro_batch_tokens: int = 16384  # of one forward and backward pass; where rows are padded, with their padding
    gradient_checkpointing: bool = False
    compile: bool = False  # the layers, with torch.compile: slow first steps, then less of the time outside of products
    snapshot_every: int = 1  # steps between copies of its state for a new trainer to go on from; 0: none
    ranks: int = 1  # processes that share the model's state and the batch's work; each has what follows
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 0  # of CPU arithmetic; 0: as many as num_cpus


@dataclass
class GeneratorConfig:
    """The engine that samples completions, and its replicas."""

    engine: str = "torch"  # torch, vllm, simulated
    replicas: int = 1
    max_replicas: int | None = None  # above `replicas`: as many more as the cluster has room for, now or later
    weight_update: str = "in_flight"  # in_flight, in_flight_recompute, drain
    max_sequences: int = 256  # completions decoded together by one replica
    cuda_graphs: bool = True  # of decode steps, on a GPU, where the model allows; false is vLLM's enforce_eager
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 0
    tensor_parallel: int = 1  # GPUs that one replica of the vllm engine spreads its model over
    gpu_memory_fraction: float = 0.85  # of each GPU, for the vllm engine's weights and KV cache
    args: dict[str, Any] = field(default_factory=dict)  # further arguments of the vllm or the simulated engine


@dataclass
class ReferenceConfig:
    """The frozen model of the KL term; started only when loss.beta > 0, and not with lora.rank."""

    replicas: int = 1
    micro_batch_tokens: int = 16384
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    threads: int = 0


@dataclass
class EvalConfig:
    """Held-out prompts, answered at the start, every so many steps, and at the end of a run."""

    prompts: int = 0  # how many; 0: no evaluation
    every: int = 0  # steps between evaluations; 0: only at the start and at the end
    samples: int = 1  # completions per prompt; pass@k is estimated for every power of two k up to this
    temperature: float | None = None  # 0: greedy; null: the training's
    success_threshold: float = 1.0  # the reward from which on a completion counts as solved
    replicas: int = 1  # generators of its own, when `every` is set; 0: borrows the training's, which waits meanwhile
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 0


@dataclass
class ClusterConfig:
    """The Ray cluster."""

    address: str | None = None  # null: a cluster of our own on this machine; auto or host:port: join one
    dashboard: bool = False  # Ray's, on localhost, for a cluster of our own
    start_timeout_s: float = 600.0
    wait_for_nodes_s: float = 0.0  # how long to wait for what a cluster that is joined lacks; 0: refuse at once


@dataclass
class DriverConfig:
    """The process with the event loop."""

    slow_callback_ms: float = 200.0  # whatever keeps all coroutines from running for longer is reported with its stack


@dataclass
class WatchdogConfig:
    """What happens to a run in which no step is finished for so long."""

    seconds: float = 1800.0
    action: str = "fail"  # fail: end the run; warn: say who waits for what, and wait on


@dataclass
class RecoveryConfig:
    """Actors that die or hang are replaced. The budgets are filled up again by every step that is trained."""

    max_restarts: int = 20  # of actors between two steps; one more ends the run with the error behind it
    max_dropped_groups: int = 100  # groups dropped between two steps because their reward failed
    health_interval_s: float = 10.0  # between two questions whether a process still answers
    health_timeout_s: float = 60.0  # one that does not answer for so long is killed and replaced
    collective_timeout_s: float = 600.0  # how long ranks of the trainer that are alive wait for each other


@dataclass
class CheckpointConfig:
    """What a run that was stopped goes on from; see `resume`."""

    every: int = 50  # steps; 0: none
    keep: int = 2  # the newest ones
    dir: str | None = None  # null: `checkpoints` in the run's folder


@dataclass
class ObserveConfig:
    log_every: int = 1  # steps between printed lines where stdout is no terminal
    report: bool = True  # report.html, at the end of the run
    timeline: bool = True  # timeline.json: who waited for what and was busy with what, to open in ui.perfetto.dev
    timeline_mb: float = 64.0  # megabytes after which nothing more is recorded
    rollouts_every: int = 16  # groups between those written to rollouts.jsonl
    rollouts_tokens: bool = True  # with every token's log-probability and policy version: about 20 bytes a token
    sinks: dict[str, Any] = field(default_factory=dict)  # tensorboard, wandb or `module:Class` -> its options


@dataclass
class RunConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    driver: DriverConfig = field(default_factory=DriverConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    seed: int = 0
    resume: str | None = None  # go on with a run: its folder, one of its checkpoints, or `auto`
    dry_run: bool = False  # check, print the plan and exit

    @property
    def ticket_capacity(self) -> int:
        return ticket_capacity(self.trainer.groups_per_step, self.buffer.max_policy_age)

    @property
    def most_rollouts(self) -> int:
        """Coroutines that make groups; with `auto` there is one for every ticket, though not all have their turn."""
        asked = self.rollout.concurrency
        return asked if isinstance(asked, int) else self.ticket_capacity

    @property
    def age_bound(self) -> int:
        return age_bound(self.trainer.groups_per_step, self.buffer.max_policy_age, self.buffer.reorder_window)

    @property
    def uses_difficulty(self) -> bool:
        return self.dataloader.sampling == "difficulty"

    @property
    def uses_adapters(self) -> bool:
        return self.lora.rank > 0

    @property
    def uses_reference(self) -> bool:
        """Whether the KL term needs a model of its own: a trainer of adapters has it, with those switched off."""
        return self.loss.beta > 0 and not self.uses_adapters

    @property
    def uses_evaluator(self) -> bool:
        return self.eval.prompts > 0 and self.eval.every > 0 and self.eval.replicas > 0

    @property
    def uses_checkpointer(self) -> bool:
        return self.checkpoint.every > 0 or self.resume is not None


def ticket_capacity(groups_per_step: int, max_policy_age: int) -> int:
    """Groups that may be begun and not yet trained-and-published: (S + 1) * P."""
    return (max_policy_age + 1) * groups_per_step


def age_bound(groups_per_step: int, max_policy_age: int, window: int) -> int:
    """Oldest age a batch can hold, S + ceil((W - 1) / P): finished groups may overtake a straggler by W - 1 places."""
    return max_policy_age + -(-(window - 1) // groups_per_step)

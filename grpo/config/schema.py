"""The settings of a whole run. `configs/` holds values for them.

The groups of settings are in algorithm.py, actors.py and operation.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge

from grpo.config.actors import (
    EvalConfig,
    GeneratorConfig,
    LoraConfig,
    ModelConfig,
    ReferenceConfig,
    TrainerConfig,
    WeightSyncConfig,
)
from grpo.config.algorithm import (
    BufferConfig,
    CorrectionConfig,
    DataloaderConfig,
    EnvironmentConfig,
    FilterConfig,
    LossConfig,
    RewardConfig,
    RolloutConfig,
    ShapingConfig,
    TaskConfig,
)
from grpo.config.fields import Hint, Settings
from grpo.config.operation import (
    CheckpointConfig,
    ClusterConfig,
    DriverConfig,
    ObserveConfig,
    RecoveryConfig,
    WatchdogConfig,
)
from grpo.utils.imports import import_target


@dataclass
class RunConfig(Settings):
    """Settings of a run: one group per field, and what concerns the run as a whole.

    Example:
        config = compose("+experiment=gsm8k_cpu", "trainer.lr=1e-6")  # see composition.py
        config.trainer.lr, config.ticket_capacity
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
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

    seed: Annotated[int, Ge(0), Hint("seeds are not negative")] = 0
    """Seed of every random draw of the run."""

    resume: str | None = None
    """Run to resume: its folder, one of its checkpoints, or auto for the newest unfinished one."""

    dry_run: bool = False
    """Check the settings, print the plan and exit."""

    @property
    def ticket_capacity(self) -> int:
        return ticket_capacity(self.trainer.groups_per_step, self.buffer.max_policy_age)

    @property
    def most_rollouts(self) -> int:
        """Rollout coroutines that are started; with `auto` one per ticket, of which the pacer lets fewer run."""
        asked = self.rollout.concurrency
        return asked if isinstance(asked, int) else self.ticket_capacity

    @property
    def age_bound(self) -> int:
        return age_bound(self.trainer.groups_per_step, self.buffer.max_policy_age, self.buffer.reorder_window)

    @property
    def uses_difficulty(self) -> bool:
        return self.dataloader.sampling == "difficulty"

    @property
    def uses_environment(self) -> bool:
        """True if episodes have several turns: with tools, or when the task has a method `environment`."""
        if self.environment.tools or self.task.target == TaskConfig.target:  # a config without a task
            return bool(self.environment.tools)
        return hasattr(import_target(self.task.target, key="task.target"), "environment")

    @property
    def uses_adapters(self) -> bool:
        return self.lora.rank > 0

    @property
    def uses_reference(self) -> bool:
        """True if the KL term needs a reference actor. With adapters, the trainer itself computes it, adapters off."""
        return self.loss.beta > 0 and not self.uses_adapters

    @property
    def uses_evaluator(self) -> bool:
        return self.eval.prompts > 0 and self.eval.every > 0 and self.eval.replicas > 0

    @property
    def uses_checkpointer(self) -> bool:
        return self.checkpoint.every > 0 or self.resume is not None


def ticket_capacity(groups_per_step: int, max_policy_age: int) -> int:
    """Return how many groups may be started and not yet trained on and published: (S + 1) * P."""
    return (max_policy_age + 1) * groups_per_step


def age_bound(groups_per_step: int, max_policy_age: int, reorder_window: int) -> int:
    """Return the largest age in a batch, S + ceil((W - 1) / P): W - 1 finished groups may overtake a straggler."""
    return max_policy_age + -(-(reorder_window - 1) // groups_per_step)

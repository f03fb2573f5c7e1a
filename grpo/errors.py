"""Every error that the package raises on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from grpo.types import Rollout


class GRPOError(Exception):
    """Root of the errors that this package raises on purpose. The message is one line that says what to do."""


class ConfigError(GRPOError):
    """A setting that can't work: found before anything heavy starts."""

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message if key is None else f"{key}: {message}")


class DataError(GRPOError):
    """Bad prompts or rewards: the user's side of the run."""


class TaskError(DataError):
    """A task that has no usable prompt."""


class ZeroVarianceGroup(DataError):
    """A group from which nothing can be learned: dropped when `filter.zero_variance` is set."""

    reason: ClassVar[str] = "zero_variance"

    def __init__(self, rollout: Rollout) -> None:
        super().__init__("all rewards of the group are equal, or no completion of it is trained on")
        self.rollout = rollout


class RewardError(DataError):
    """A reward function that raised. Its subclasses tell what else may go wrong.

    A group that is dropped for it (`reward.on_error=drop`) is counted under `reason`.
    """

    reason: ClassVar[str] = "reward_error"


class RewardTimeout(RewardError):
    """A reward function that was killed for taking too long: nothing is known of the answer."""

    reason = "reward_timeout"


class RewardCrash(RewardError):
    """A reward function whose process died."""

    reason = "reward_crash"


class RewardMemory(RewardError):
    """A reward function that asked for more memory than `reward.memory_gb`."""

    reason = "reward_memory"


class RewardInvalid(RewardError):
    """A reward function that returned NaN, infinity, or a wrong number of scores."""

    reason = "reward_invalid"


class InfrastructureError(GRPOError):
    """A process or a node failed, or could not be had."""


class LaunchError(InfrastructureError):
    """The cluster can't hold the actors, or they did not come up in time."""


class ActorDied(InfrastructureError):
    """The process behind a handle is gone."""


class PayloadLost(InfrastructureError):
    """Tokens or weights that lay on a node, or were owned by a process, that is gone."""


class TransferError(InfrastructureError):
    """Weights that did not get from one process into the others: a broken connection, a time-out."""


class CheckpointError(GRPOError):
    """A checkpoint that could not be written, or that is broken, half-written, or of another run."""


class RecoveryError(GRPOError):
    """An actor that died and can't be brought back to where it was."""


class ControlError(GRPOError):
    """An operator's request that no run is there to answer, or that the run refuses."""


class ReportError(GRPOError):
    """A folder of which no report can be made."""


class TuningError(GRPOError):
    """Nothing can be said of a run's concurrency: no profile, or a run that failed."""


class NothingTrained(ReportError):
    """The folder of a run that has not trained a step yet, or never will."""


class StalledError(InfrastructureError):
    """Nothing was trained for `watchdog.seconds`."""


class StalenessError(GRPOError):
    """A batch holds a group older than the bound: a bug in pacing, never a thing to tolerate."""


class MixedVersionsError(GRPOError):
    """An evaluation that not one policy version alone has answered: a bug, never a thing to tolerate."""


class WeightsError(GRPOError):
    """Weights that are not finite, or that don't fit the model they are loaded into."""


class NonFiniteError(GRPOError):
    """Too many updates in a row whose loss or gradient was not finite."""

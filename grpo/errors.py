"""The errors that the package raises on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from grpo.types import Rollout


class GRPOError(Exception):
    """Root of the error tree. The message is one line that names the problem and the fix."""


class ConfigError(GRPOError):
    """A setting that can't work, found before anything heavy starts. `key` is the setting's name in the config."""

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message if key is None else f"{key}: {message}")


class DataError(GRPOError):
    """A problem in the user's prompts or rewards."""


class TaskError(DataError):
    """A task without a usable prompt."""


class ZeroVarianceGroup(DataError):
    """A zero-variance group: there is nothing to learn from it. Dropped if `filter.zero_variance` is set."""

    reason: ClassVar[str] = "zero_variance"

    def __init__(self, rollout: Rollout) -> None:
        super().__init__("all rewards of the group are equal, or no completion of it is trained on")
        self.rollout = rollout


class GroupError(DataError):
    """A failure of the user's code that costs one group. The settings decide whether it also ends the run.

    Groups dropped for it are counted under `reason`.
    """

    reason: ClassVar[str]


class RewardError(GroupError):
    """A reward function that raised; see `reward.on_error`. Subclasses are its other failures."""

    reason = "reward_error"


class RewardTimeout(RewardError):
    """A reward function that was killed for taking too long: the answer may be right or wrong."""

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


class EnvironmentFailed(GroupError):
    """An environment that raised; see `environment.on_error`. Subclasses are its other failures."""

    reason = "environment_error"


class EnvironmentTimeout(EnvironmentFailed):
    """An environment that did not return in time. `hung`: its thread can't be ended, only its process."""

    reason = "environment_timeout"

    def __init__(self, message: str, *, hung: bool = False) -> None:
        super().__init__(message)
        self.hung = hung


class EnvironmentInvalid(EnvironmentFailed):
    """An environment that returned something else than the protocol says, or whose prompt is too long."""

    reason = "environment_invalid"


class InfrastructureError(GRPOError):
    """A process or a node that failed or did not become available."""


class LaunchError(InfrastructureError):
    """The cluster has no room for the actors, or they did not start in time."""


class ActorDied(InfrastructureError):
    """The process behind a handle is gone."""


class PayloadLost(InfrastructureError):
    """Tokens or weights that were lost with the node that stored them or the process that owned them."""


class LeaseLost(InfrastructureError):
    """The generator that an episode was played with is gone; the group is played again with another one."""


class TransferError(InfrastructureError):
    """A broadcast of weights that failed: a broken connection or a time-out."""


class CheckpointError(GRPOError):
    """A checkpoint that could not be written, or that is damaged, incomplete, or of another run."""


class RecoveryError(GRPOError):
    """An actor that died and whose state can't be restored."""


class ControlError(GRPOError):
    """An operator's request without a run to answer it, or that the run refuses."""


class ReportError(GRPOError):
    """A folder from which no report can be made."""


class TuningError(GRPOError):
    """A run whose concurrency can't be tuned: it has no profile, or it failed."""


class NothingTrained(ReportError):
    """The folder of a run that has not trained a step."""


class StalledError(InfrastructureError):
    """A run without progress for `watchdog.seconds`."""


class StalenessError(GRPOError):
    """A batch with a group older than the bound: a bug in pacing, never to be tolerated."""


class MixedVersionsError(GRPOError):
    """An evaluation answered by more than one policy version: a bug, never to be tolerated."""


class WeightsError(GRPOError):
    """Weights that are not finite, are damaged, or don't fit the model they are loaded into."""


class NonFiniteError(GRPOError):
    """Too many updates in a row whose loss or gradient was not finite."""

"""The actor that plays episodes: one replica of the environment service."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

from grpo.actors.marks import returns_payload
from grpo.config.schema import RunConfig
from grpo.environments.calls import UserCalls
from grpo.environments.player import Episode, Player
from grpo.errors import ActorDied, LeaseLost
from grpo.models.tokenizer import load_tokenizer, stop_token_ids_of, tokens_as_json, transcript
from grpo.tasks.base import environment_maker, make_renderer, make_task
from grpo.telemetry.loop_lag import watch_loop
from grpo.telemetry.recording import measure, no_spans, note, span, warn
from grpo.types import Completion, Detail, GenerationReport, Ints, Prompt, SamplingParams, Scores, generation_report
from grpo.utils.aio import cancel_and_wait


class GeneratorLease(Protocol):
    """One generator process, as another actor calls it. All turns of a group go there, so it keeps their prefixes."""

    async def invoke(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        """Return the answer of the process. Raises ActorDied when it is dead."""
        ...


@dataclass(frozen=True)
class PlayReport:
    """The numbers of a played group, and the tokens that its episodes began with."""

    generation: GenerationReport
    scores: Scores
    opening: Ints


class EnvironmentHost:
    """Plays groups of episodes, thousands of them side by side. The policy's turns come straight from a generator.

    User code that is not async runs in threads. A thread that hangs costs the process, which is replaced.

    Example:
        host = EnvironmentHost(config)
        await host.setup()
        async with services.generator.lease() as generator:
            completions, report = await host.play(prompt, params, generator)
        report.scores.rewards
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._calls = UserCalls(config.environment.threads)
        self._watching: asyncio.Task[NoReturn] | None = None

    async def setup(self) -> None:
        """Make the task. Raises ConfigError for a tool, a task or a chat template that can't be used."""
        config = self._config
        task = make_task(config.task)
        self._tokenizer = load_tokenizer(config.model, text_only=True)
        renderer = make_renderer(self._tokenizer, config.task, stop_token_ids_of(config.model, self._tokenizer))
        make = environment_maker(task, config.task, config.environment.tools, self._calls)
        most = config.rollout.max_prompt_tokens
        self._player = Player(make, renderer, config.environment, self._calls, max_prompt_tokens=most)
        self._watching = asyncio.create_task(_watch_loop(config.driver.slow_callback_ms))

    @returns_payload
    async def play(
        self, prompt: Prompt, params: SamplingParams, generator: GeneratorLease, detail: Detail = "rewards"
    ) -> tuple[list[Completion], PlayReport]:
        """Play the `params.n` episodes of a group, with the generator that the caller has leased.

        Raises EnvironmentFailed or a subclass, and LeaseLost when the generator dies.
        """

        async def sample(prompt_ids: Ints, turn: SamplingParams) -> list[Completion]:
            with span("turn", "wait", prompt_tokens=len(prompt_ids)):
                try:
                    completions: list[Completion] = await generator.invoke("sample", (prompt_ids, turn))
                except ActorDied as error:  # as an ActorDied it would be the death of this process to the caller
                    raise LeaseLost(str(error)) from error
                note(sampled=sum(completion.sampled_count for completion in completions))
            return completions

        # Every episode has a lane in the timeline. Those of all groups, and of evaluations, would be thousands.
        logged = detail != "rewards"
        with span("episodes", "stage", prompt=prompt.serial, episodes=params.n) if logged else no_spans():
            opening, episodes = await self._player.play(prompt, params, sample)
        completions = [episode.completion for episode in episodes]
        report = replace(generation_report(completions), episodes=tuple(episode.report for episode in episodes))
        return completions, PlayReport(report, self._scores(episodes, detail), opening)

    async def ping(self) -> None:
        """Raise ActorDied when a thread of user code hangs."""
        if self._calls.hanging(self._config.environment.timeout_s):
            raise ActorDied("environment: user code hangs in a thread")

    async def close(self) -> None:
        self._calls.close()
        if self._watching is not None:
            await cancel_and_wait([self._watching])

    def _scores(self, episodes: Sequence[Episode], detail: Detail) -> Scores:
        rewards = tuple(episode.reward for episode in episodes)
        parts = {"environment": rewards}
        if detail == "rewards":
            return Scores(rewards, parts, ())
        transcripts = tuple(transcript(self._tokenizer, each.completion, each.report.ended_by) for each in episodes)
        completions = [episode.completion for episode in episodes]
        tokens = tokens_as_json(self._tokenizer, completions) if detail == "tokens" else ""
        return Scores(rewards, parts, tuple(map(str, transcripts)), tokens, transcripts)


async def _watch_loop(slow_callback_ms: float) -> NoReturn:
    """Measure how late the event loop is, and warn of an `async def` that blocks it: all episodes wait for it."""

    def blocked(message: str) -> None:
        measure("environment/slow_callbacks", 1, "sum")
        warn(message)

    await watch_loop(
        slow_callback_ms, blocked, lambda lag_s: measure("environment/loop_lag_ms", 1000 * lag_s, "percentiles")
    )

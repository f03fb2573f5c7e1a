"""Play the episodes of one group: turns of the policy and replies of its environments, until each is over.

    opening --> turn --> reply --> turn --> reply --> ... --> turn --> score
                sampled  given     sampled                    sampled

An episode ends when its environment says so, or at the first limit. They are checked in this order after every turn:

    max_completion_tokens    there is no room for another token; in the middle of a turn, nobody replies to it
    timeout_s                the environment's own time is used up
    max_turns                the policy has had its turns
    max_completion_tokens    the reply leaves no room for another token
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from grpo.config.algorithm import EnvironmentConfig
from grpo.environments.base import Environment, Message, Opening, Reply
from grpo.environments.calls import UserCalls
from grpo.environments.renderers import Context, Renderer
from grpo.errors import EnvironmentFailed, EnvironmentInvalid, EnvironmentTimeout, GRPOError
from grpo.telemetry.recording import note, span
from grpo.types import Completion, EpisodeEnd, EpisodeReport, Floats, Ints, Prompt, SamplingParams, Turn
from grpo.utils.aio import being_cancelled, gather_or_cancel, timeout_as

Sampler = Callable[[Ints, SamplingParams], Awaitable[list[Completion]]]
"""Samples the next turn: `params.n` completions of one prompt."""

_CLOSE_S = 10.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Episode:
    """A finished episode: its tokens, its reward and its numbers."""

    completion: Completion
    reward: float
    report: EpisodeReport


class Player:
    """Plays groups, any number of them side by side on one event loop.

    Example:
        renderer, calls = PlainRenderer(tokenizer, stops), UserCalls(threads=8)
        player = Player(task.environment, renderer, EnvironmentConfig(), calls, max_prompt_tokens=512)
        opening, episodes = await player.play(prompt, SamplingParams(n=8, max_tokens=64), engine.generate)
    """

    def __init__(
        self,
        make: Callable[[Any, int], Environment],
        renderer: Renderer,
        config: EnvironmentConfig,
        calls: UserCalls,
        *,
        max_prompt_tokens: int,
    ) -> None:
        self._max_prompt_tokens = max_prompt_tokens
        self._make, self.renderer, self.config, self.calls = make, renderer, config, calls

    async def play(self, prompt: Prompt, params: SamplingParams, sample: Sampler) -> tuple[Ints, list[Episode]]:
        """Return the opening's tokens and the `params.n` episodes of a group.

        `params.max_tokens` bounds an episode's tokens after the opening. Raises what `sample` raises, and an
        EnvironmentFailed when an environment raises, hangs, or returns something else than the protocol says. All
        environments are closed in any case.
        """
        playing = [_Playing(self, i, params, sample) for i in range(params.n)]
        try:
            openings = await gather_or_cancel(*(each.begin(self._make, prompt) for each in playing))
            if any(opening != openings[0] for opening in openings):
                raise EnvironmentInvalid("the episodes of a group must begin with the same messages and tools")
            opening_ids = self.renderer.opening(openings[0].messages, openings[0].tools)
            if not 0 < len(opening_ids) <= self._max_prompt_tokens:
                raise EnvironmentInvalid(
                    f"an episode begins with {len(opening_ids)} tokens, must be from 1 to "
                    f"rollout.max_prompt_tokens={self._max_prompt_tokens}"
                )
            started = time.perf_counter()
            first = await sample(opening_ids, playing[0].next_turn(n=params.n))
            waited_s = time.perf_counter() - started
            turns = zip(playing, first, strict=True)
            context = Context(opening_ids, openings[0].tools)
            work = [each.play(context, turn, waited_s) for each, turn in turns]
            return opening_ids, await gather_or_cancel(*work)
        finally:
            await asyncio.shield(asyncio.gather(*(each.close() for each in playing)))


class _Playing:
    """One episode while it is played."""

    def __init__(self, player: Player, number: int, params: SamplingParams, sample: Sampler) -> None:
        self._renderer, self._config, self._calls = player.renderer, player.config, player.calls
        self._number, self._params, self._sample = number, params, sample
        self._environment: Environment | None = None
        self._tokens: list[Ints] = []
        self._logprobs: list[Floats] = []
        self._versions: list[tuple[int, int]] = []
        self._turns: list[Turn] = []
        self._environment_s = self._generator_s = 0.0
        self._metrics = Counter[str]()

    @property
    def _sampled_count(self) -> int:
        return sum(turn.sampled for turn in self._turns)

    @property
    def _room(self) -> int:
        """Tokens that the episode may still take."""
        return self._params.max_tokens - sum(turn.sampled + turn.given for turn in self._turns)

    def next_turn(self, n: int = 1) -> SamplingParams:
        """Return the parameters of the next turn; the first turns of a group are sampled together."""
        return replace(
            self._params,
            n=n,
            max_tokens=min(self._room, self._config.max_turn_tokens or self._room),
            first_sample=self._number,
            first_token=self._sampled_count,
            keep_prefix=len(self._turns) + 1 < self._config.max_turns,
        )

    async def begin(self, make: Callable[[Any, int], Environment], prompt: Prompt) -> Opening:
        # All episodes of a group get one seed, which follows from the run's seed and the prompt's serial.
        self._environment = await self._in_time("environment", make, prompt.problem, self._params.seed)
        opening = await self._in_time("begin", self._environment.begin)
        if not isinstance(opening, Opening) or not opening.messages or not _are_messages(opening.messages):
            raise EnvironmentInvalid(f"begin returned {_shown(opening)}; return an Opening with a tuple of Messages")
        return opening

    async def play(self, context: Context, turn: Completion, waited_s: float) -> Episode:
        """Play on from the first turn, which took `waited_s`, until the episode is over, and score it."""
        self._generator_s = waited_s
        with span("episode", "stage", number=self._number):
            episode = await self._play_on(context, turn)
            note(turns=episode.report.turns, ended_by=episode.report.ended_by, reward=episode.reward)
            return episode

    async def _play_on(self, context: Context, turn: Completion) -> Episode:
        while True:
            self._add(turn)
            ended_by, messages = await self._answer(turn, context)
            if ended_by is not None:
                break
            messages = [self._shorten(message) for message in messages]
            given = self._renderer.continuation(turn.token_ids, messages, context)
            if len(given) >= self._room:
                ended_by = "tokens"
                break
            self._tokens.append(given)
            self._turns[-1] = replace(self._turns[-1], given=len(given))
            context = replace(context, prompt=np.concatenate([context.prompt, turn.token_ids, given]))
            started = time.perf_counter()
            [turn] = await self._sample(context.prompt, self.next_turn())
            self._generator_s += time.perf_counter() - started
        return Episode(self._completion(ended_by), await self._score(ended_by), self._report(ended_by))

    async def _answer(self, turn: Completion, context: Context) -> tuple[EpisodeEnd | None, Sequence[Message]]:
        """Ask the environment to reply to a turn. Returns what ends the episode, or None and the messages."""
        if self._room == 0 and turn.finish_reason == "length":
            return "tokens", ()  # in the middle of a turn, to which there is no reply
        assert self._environment is not None
        try:
            said = self._renderer.parse(turn.token_ids, context)
            with span("reply"):
                reply = await self._in_time("reply", self._environment.reply, said)
        except EnvironmentTimeout as error:
            if error.hung:
                raise
            return "timeout", ()
        self._check(reply)
        self._turns[-1] = replace(self._turns[-1], reward=float(reply.reward))
        self._metrics.update(reply.metrics)
        if reply.done:
            return "done", ()
        if self._room == 0:
            return "tokens", ()
        if self._environment_s >= self._config.timeout_s:
            return "timeout", ()
        return ("turns" if len(self._turns) >= self._config.max_turns else None), reply.messages

    async def _score(self, ended_by: EpisodeEnd) -> float:
        if ended_by != "done" and self._config.on_limit == "zero":
            return 0.0
        score = _own_method(self._environment, "score")
        if score is None:
            return sum(turn.reward for turn in self._turns)
        reward = await self._in_time("score", score, grace_s=self._config.timeout_s)  # also after a time-out
        if not _is_finite(reward):
            raise EnvironmentInvalid(f"score returned {_shown(reward)}; return a finite number")
        return float(reward)

    async def _in_time(self, name: str, function: Callable[..., Any], *args: Any, grace_s: float = 0.0) -> Any:
        """Call the user's code, within what is left of `timeout_s` and `grace_s`.

        A thread can't be cancelled, so it has `timeout_s` more to return; after that it hangs. Waiting for a free
        thread does not count. Raises EnvironmentTimeout, and EnvironmentFailed for whatever the code raises.
        """
        timeout_s = self._config.timeout_s

        def late(*, hung: bool) -> EnvironmentTimeout:
            return EnvironmentTimeout(f"{name} did not return within environment.timeout_s={timeout_s:g}", hung=hung)

        left_s = max(0.0, timeout_s - self._environment_s)
        call = await self._calls.start(function, *args)
        started = time.perf_counter()
        try:
            async with timeout_as(left_s + max(grace_s, timeout_s), lambda: late(hung=True)):
                result = await call
            if not inspect.isawaitable(result):
                return result
            left_s = max(0.0, left_s + grace_s - (time.perf_counter() - started))
            async with timeout_as(left_s, lambda: late(hung=False)):
                return await result
        except GRPOError:
            raise
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            if being_cancelled():
                raise
            text = " ".join(str(error).split())
            raise EnvironmentFailed(f"{name} raised {type(error).__name__}: {text}") from error
        finally:
            self._environment_s += time.perf_counter() - started

    def _add(self, turn: Completion) -> None:
        self._tokens.append(turn.token_ids)
        self._logprobs.append(turn.logprobs)
        self._versions += turn.versions
        self._turns.append(Turn(turn.sampled_count, finish_reason=turn.finish_reason))

    def _completion(self, ended_by: EpisodeEnd) -> Completion:
        return Completion(
            token_ids=np.concatenate(self._tokens),
            logprobs=np.concatenate(self._logprobs),
            versions=merge_runs(self._versions),
            finish_reason="length" if ended_by == "tokens" else "stop",
            turns=tuple(self._turns),
        )

    def _report(self, ended_by: EpisodeEnd) -> EpisodeReport:
        return EpisodeReport(
            turns=len(self._turns),
            given=sum(turn.given for turn in self._turns),
            ended_by=ended_by,
            environment_s=self._environment_s,
            generator_s=self._generator_s,
            metrics=dict(self._metrics),
        )

    def _check(self, reply: Any) -> None:
        if not isinstance(reply, Reply) or not _are_messages(reply.messages):
            raise EnvironmentInvalid(f"reply returned {_shown(reply)}; return a Reply with a tuple of Messages")
        if any(message.role == "assistant" for message in reply.messages):
            raise EnvironmentInvalid("reply returned a message of role assistant; only the policy speaks as assistant")
        if not _is_finite(reply.reward):
            raise EnvironmentInvalid(f"reply returned the reward {_shown(reply.reward)}; return a finite number")
        if not isinstance(reply.metrics, Mapping) or not all(map(_is_finite, reply.metrics.values())):
            raise EnvironmentInvalid(f"reply returned the metrics {_shown(reply.metrics)}; return finite numbers")

    def _shorten(self, message: Message) -> Message:
        return replace(message, content=self._renderer.shorten(message.content, self._config.max_reply_tokens))

    async def close(self) -> None:
        close = _own_method(self._environment, "close")
        if close is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._calls.returned(self._environment)
                await self._calls.run(close)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            if being_cancelled():
                raise
            log.warning("an environment did not close: %s: %s", type(error).__name__, error)


def merge_runs(runs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join neighbouring runs of the same version.

    >>> merge_runs([(3, 2), (3, 1), (4, 5)])
    ((3, 3), (4, 5))
    """
    merged: list[tuple[int, int]] = []
    for version, count in runs:
        if merged and merged[-1][0] == version:
            merged[-1] = (version, merged[-1][1] + count)
        else:
            merged.append((version, count))
    return tuple(merged)


def _own_method(environment: Environment | None, name: str) -> Callable[..., Any] | None:
    """Return a method that may be left out; None if it is, or if it is only inherited from the protocol."""
    if getattr(type(environment), name, None) is getattr(Environment, name):
        return None
    return getattr(environment, name, None)


def _are_messages(messages: object) -> bool:
    return isinstance(messages, (tuple, list)) and all(
        isinstance(message, Message) and isinstance(message.content, str) for message in messages
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, (Real, np.bool_)) and math.isfinite(float(value))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

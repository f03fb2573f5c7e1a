"""The live view's content: as many lines as the terminal is high, none longer than it is wide."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from grpo.types import EvaluationReport, Transcript

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 48
_LABEL = 14  # columns
_HELP = "s: last samples   Ctrl-C: finish this step and stop"
Waiting = Mapping[tuple[str, str], float]  # (group of coroutines, wait) -> how many wait there, on average


@dataclass(frozen=True)
class RunStatus:
    """A snapshot of the run: statistics of every replica by service, restarts by replica, waiting coroutines."""

    replicas: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    restarts: Mapping[str, int] = field(default_factory=dict)
    waiting: Waiting = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A finished group; `step` is the last trained step at that time. Episodes have transcripts."""

    step: int
    prompt: str
    completions: Sequence[str]
    rewards: Sequence[float]
    transcripts: Sequence[Transcript] = ()


class LastWarning(NamedTuple):
    message: str
    step: int
    at_s: float  # of time.perf_counter


class _Block(NamedTuple):
    """Lines that are shown together or not at all; when there is no room, the highest rank is left out first."""

    rank: int
    lines: Sequence[RenderableType]


class View:
    """Renders in one thread the attributes that another thread sets; each is replaced as a whole, never changed."""

    def __init__(self, max_steps: int) -> None:
        self.metrics: Mapping[str, float] = {}
        self.curve = ""  # of the reward
        self.held_out = ""
        self.status = RunStatus()
        self.last_warning: LastWarning | None = None
        self.sample: Sample | None = None
        self.shows_sample = False
        self.help = False
        self._progress = Progress(*progress_columns("step"), expand=True)
        self._task = self._progress.add_task("train", total=max_steps, start=False)

    def start(self) -> None:
        """Start the clock; further calls do nothing."""
        self._progress.start_task(self._task)

    def trained(self, metrics: Mapping[str, float], curve: str) -> None:
        self._progress.update(self._task, completed=metrics["step"])
        self.metrics, self.curve = metrics, curve

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, room = options.max_width, console.height
        blocks = [_Block(0, [self._progress]), *self._numbers(width)]
        end = [self._warning(), _Block(9, [Text(_HELP, style="dim")] if self.help else [])]
        if self.shows_sample:
            left = room - sum(len(block.lines) for block in (*blocks, *end))
            middle = [_Block(2, _sample_lines(self.sample, console, width, max(3, left)))]
        else:
            middle = [self._services(), self._waiting()]
        for block in _fitting([*blocks, *middle, *end], room):
            for line in block.lines:
                yield _cut(line, width) if isinstance(line, Text) else line

    def _numbers(self, width: int) -> Sequence[_Block]:
        shown = []
        if self.metrics:
            facts = as_facts(self.metrics)
            reward = _labelled("reward", f"{facts.pop('reward')}  ")
            latest = self.curve[-max(1, width - len(reward)) :]
            shown = [_Block(1, [reward.append(latest, style="green")])]
            shown.append(_Block(3, [_labelled("loss", "  ".join((facts.pop("loss"), *map(" ".join, facts.items()))))]))
        if self.held_out:
            shown.append(_Block(6, [_labelled("held-out", self.held_out)]))
        return shown

    def _services(self) -> _Block:
        replicas = self.status.replicas
        lines = [_service_line(name, replicas[name], self.status.restarts, self.metrics) for name in replicas]
        head = Text(f"{'':{_LABEL}}{'up':>5}{'calls':>7}{'mean':>8}", style="dim")
        return _Block(4, [head, *lines] if lines else [])

    def _waiting(self) -> _Block:
        waiting = waiting_line(self.status.waiting)
        return _Block(7, [_labelled("waiting", waiting)] if waiting else [])

    def _warning(self) -> _Block:
        if self.last_warning is None:
            return _Block(5, [])
        ago = _long(time.perf_counter() - self.last_warning.at_s)
        line = _labelled("warning", f"step {self.last_warning.step}, {ago} ago: {visible(self.last_warning.message)}")
        line.stylize("yellow")
        return _Block(5, [line])


def progress_columns(label: str) -> tuple[ProgressColumn, ...]:
    left = (TextColumn("left"), TimeRemainingColumn())
    return TextColumn(f"[bold]{label}"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeElapsedColumn(), *left


def as_facts(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the main numbers of a step, formatted."""
    return {
        "reward": f"{metrics['reward/mean']:.3f}",
        "loss": f"{metrics['loss']:+.4f}",
        "age": f"{metrics['policy_age/mean']:.2f} (max {metrics['policy_age/max']:.0f})",
        "trainer wait": f"{metrics['time/trainer_wait_s'] / metrics['time/step_s']:4.0%}",
    }


def tokens_per_s(metrics: Mapping[str, float]) -> str:
    return f"{metrics['generator/tokens_per_s']:,.0f} tokens/s"


def held_out(report: EvaluationReport) -> str:
    """Format an evaluation: mean and standard error, pass@k of the largest k, and the step."""
    k = max(report.pass_at)
    passed = f"  pass@{k} {report.pass_at[k]:.3f}" if k > 1 else ""
    return f"{report.reward_mean:.3f} ± {report.reward_stderr:.3f}{passed}  after step {report.step}"


def sparkline(values: Sequence[float]) -> str:
    """Draw the last values as block characters, scaled to the minimum and maximum of all values."""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values[-_SPARKS:])


def visible(text: str) -> str:
    """Escape line breaks and control characters, which would move the cursor or change colours."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def waiting_line(waiting: Waiting) -> str:
    """Format the two most frequent waits of each group of coroutines, the smallest group first.

    For example: `training: 0.7 trainer.train_step; rollouts: 14 generator.generate, 9.8 ticket`.
    """
    groups: dict[str, list[tuple[float, str]]] = {}
    for (group, what), count in waiting.items():
        if count >= 0.05:
            groups.setdefault(group, []).append((count, what))
    return "; ".join(
        f"{group}: {', '.join(f'{_count(count)} {what}' for count, what in sorted(waits, reverse=True)[:2])}"
        for group, waits in sorted(groups.items(), key=lambda item: sum(count for count, _ in item[1]))
    )


def _count(mean: float) -> str:
    return f"{mean:.0f}" if mean >= 10 else f"{mean:.1f}"


def _service_line(
    name: str, replicas: Mapping[str, Mapping[str, Any]], restarts: Mapping[str, int], metrics: Mapping[str, float]
) -> Text:
    """Format a service: replicas up and wanted, calls in flight, mean seconds of a call, restarts, own metrics."""
    stats = [each for each in replicas.values() if each["state"] != "stopped"]
    up = sum(each["state"] == "healthy" for each in stats)
    requests = sum(each["requests"] for each in stats)
    busy_s = sum((each["latency_s"] or 0.0) * each["requests"] for each in stats)
    mean = _short(busy_s / requests) if requests else ""
    line = _labelled(name, f"{f'{up}/{len(stats)}':>5}{sum(each['in_flight'] for each in stats):>7}{mean:>8}")
    if up < len(stats):
        states = sorted({each["state"] for each in stats if each["state"] != "healthy"})
        line.append(f"  {', '.join(states)}", style="yellow")
    if count := sum(restarts.get(replica, 0) for replica in replicas):
        line.append(f"  {count} restart{'s' if count > 1 else ''}", style="yellow")
    return line.append("".join(f"  {fact}" for fact in _service_facts(name, metrics)))


def _service_facts(name: str, metrics: Mapping[str, float]) -> Sequence[str]:
    """Return the metrics that belong to one service."""
    if not metrics:
        return ()
    if name == "generator":
        return f"busy {metrics['generator/busy_fraction']:.0%}", tokens_per_s(metrics)
    if name == "trainer":
        return (f"busy {metrics['time/train_step_s'] / metrics['time/step_s']:.0%}",)
    if name == "replay_buffer":
        return (f"{metrics['buffer/groups_waiting']:.0f} groups waiting",)
    return ()


def _sample_lines(sample: Sample | None, console: Console, width: int, room: int) -> Sequence[Text]:
    """Return the prompt, the best and the worst completion: a third of the lines each, or what the others leave."""
    if sample is None:
        return [_labelled("sample", "none yet (observe.rollouts_every)")]
    best, worst = (choose(range(len(sample.rewards)), key=sample.rewards.__getitem__) for choose in (max, min))
    shown = [("all", best)] if sample.rewards[best] == sample.rewards[worst] else [("best", best), ("worst", worst)]
    lines = [_labelled("sample", f"after step {sample.step}, one group of {len(sample.rewards)}")]
    lines += _wrapped("prompt", sample.prompt, console, width, max(1, (room - len(lines)) // (len(shown) + 1)))
    for i, (word, place) in enumerate(shown):
        label, most = f"{word} {sample.rewards[place]:.4g}", max(1, (room - len(lines)) // (len(shown) - i))
        if sample.transcripts:
            lines += _conversation(label, sample.transcripts[place], console, width, most)
        else:
            lines += _wrapped(label, sample.completions[place], console, width, most)
    return lines


def _conversation(label: str, episode: Transcript, console: Console, width: int, most: int) -> Sequence[Text]:
    """Return at most `most` lines: what ended the episode, then its turns, those in the middle left out if need be."""
    ended = "done" if episode.ended_by == "done" else f"limit: {episode.ended_by}"
    texts = []
    for i, turn in enumerate(episode.turns, 1):
        texts.append((f"  {i} {turn.reward:+.3g}" if turn.reward else f"  {i}", turn.sampled, ""))
        if turn.given_tokens:
            texts.append(("  given", turn.given, "dim"))
    if len(texts) >= most:  # the end matters as much as the beginning
        texts[(most - 1) // 2 : len(texts) - (most - 2) // 2] = [("", "…", "dim")]
    lines = [_labelled(label, f"{len(episode.turns)} turn{'s' if len(episode.turns) > 1 else ''}, {ended}")]
    for i, (name, text, style) in enumerate(texts):
        lines += _wrapped(name, text, console, width, max(1, (most - len(lines)) // (len(texts) - i)), style)
    return lines[:most]


def _wrapped(label: str, text: str, console: Console, width: int, most: int, style: str = "") -> Sequence[Text]:
    """Wrap text to `most` lines at most; the last ends in an ellipsis if text is cut off."""
    inner = max(1, width - _LABEL)
    shown = visible(text[: inner * (most + 1)])  # wrapping a long text is slow
    lines = list(Text(shown).wrap(console, inner, overflow="fold"))[: most + 1] or [Text()]
    if len(lines) > most:
        lines = lines[:most]
        lines[-1] = Text(f"{lines[-1].plain.rstrip()[: inner - 1]}…")
    return [_labelled("" if i else label, line.plain.rstrip(), style) for i, line in enumerate(lines)]


def _fitting(blocks: Sequence[_Block], room: int) -> Sequence[_Block]:
    fit = [block for block in blocks if block.lines]
    while len(fit) > 1 and sum(len(block.lines) for block in fit) > room:
        fit.remove(max(fit, key=lambda block: block.rank))
    return fit


def _labelled(label: str, text: str, style: str = "") -> Text:
    return Text().append(f"{label:<{_LABEL}}", style="dim").append(text, style=style)


def _cut(line: Text, width: int) -> Text:
    line.no_wrap = True
    if cell_len(line.plain) > width:
        line.truncate(width, overflow="ellipsis")
    return line


def _short(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    return _long(seconds)


def _long(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"

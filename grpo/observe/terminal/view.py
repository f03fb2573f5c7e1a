"""What the live view is made of: as many lines as the terminal has room for, none longer than it is wide."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from grpo.types import EvaluationReport

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 48
_LABEL = 14  # columns
_HELP = "s: the last samples   Ctrl-C: finish this step and end"
Waiting = Mapping[tuple[str, str], float]  # group of coroutines and what they wait for -> how many, on average


@dataclass(frozen=True)
class RunStatus:
    """What the run does at this moment: figures of every replica by service, restarts by replica, who waits."""

    replicas: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    restarts: Mapping[str, int] = field(default_factory=dict)
    waiting: Waiting = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A finished group: `step` is the last one that was trained by then."""

    step: int
    prompt: str
    completions: Sequence[str]
    rewards: Sequence[float]


class LastWarning(NamedTuple):
    message: str
    step: int
    at_s: float  # of time.perf_counter


class _Block(NamedTuple):
    """Lines that are shown together or not at all; where there is no room, those of the highest rank go first."""

    rank: int
    lines: Sequence[RenderableType]


class View:
    """Drawn in one thread from what another sets: every attribute is replaced as a whole."""

    def __init__(self, max_steps: int) -> None:
        self.metrics: Mapping[str, float] = {}
        self.curve = ""  # of the reward
        self.held_out = ""
        self.glance = RunStatus()
        self.warned: LastWarning | None = None
        self.sample: Sample | None = None
        self.shows_sample = False
        self.help = False
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            expand=True,
        )
        self._task = self._progress.add_task("train", total=max_steps, start=False)

    def start(self) -> None:
        """Time counts from the first call on."""
        self._progress.start_task(self._task)

    def trained(self, metrics: Mapping[str, float], curve: str) -> None:
        self._progress.update(self._task, completed=metrics["step"])
        self.metrics, self.curve = metrics, curve

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, room = options.max_width, console.height
        blocks = [_Block(0, [self._progress]), *self._numbers(width)]
        middle = [] if self.shows_sample else [self._services(), self._waiting()]
        end = [self._warning(), _Block(9, [Text(_HELP, style="dim")] if self.help else [])]
        if self.shows_sample:
            left = room - sum(len(block.lines) for block in (*blocks, *end))
            middle = [_Block(2, _sample_lines(self.sample, console, width, max(3, left)))]
        for block in _that_fit([*blocks, *middle, *end], room):
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
        replicas = self.glance.replicas
        lines = [_service_line(name, replicas[name], self.glance.restarts, self.metrics) for name in replicas]
        head = Text(f"{'':{_LABEL}}{'up':>5}{'calls':>7}{'mean':>8}", style="dim")
        return _Block(4, [head, *lines] if lines else [])

    def _waiting(self) -> _Block:
        said = who_waits_in_short(self.glance.waiting)
        return _Block(7, [_labelled("waiting", said)] if said else [])

    def _warning(self) -> _Block:
        if self.warned is None:
            return _Block(5, [])
        ago = _long(time.perf_counter() - self.warned.at_s)
        line = _labelled("warning", f"step {self.warned.step}, {ago} ago: {visible(self.warned.message)}")
        line.stylize("yellow")
        return _Block(5, [line])


def as_facts(metrics: Mapping[str, float]) -> dict[str, str]:
    """The numbers of a step that matter most."""
    return {
        "reward": f"{metrics['reward/mean']:.3f}",
        "loss": f"{metrics['loss']:+.4f}",
        "age": f"{metrics['policy_age/mean']:.2f} (max {metrics['policy_age/max']:.0f})",
        "trainer wait": f"{metrics['time/trainer_wait_s'] / metrics['time/step_s']:4.0%}",
    }


def tokens_per_s(metrics: Mapping[str, float]) -> str:
    return f"{metrics['generator/tokens_per_s']:,.0f} tokens/s"


def held_out(report: EvaluationReport) -> str:
    """One evaluation in a line: mean and standard error, the largest k of pass@k, and when."""
    k = max(report.pass_at)
    passed = f"  pass@{k} {report.pass_at[k]:.3f}" if k > 1 else ""
    return f"{report.reward_mean:.3f} ± {report.reward_stderr:.3f}{passed}  after step {report.step}"


def sparkline(values: Sequence[float]) -> str:
    """The last values as block characters between the smallest and the largest of them all."""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values[-_SPARKS:])


def visible(text: str) -> str:
    """On one line, with what would move a cursor or change a colour written out as its escape sequence."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def who_waits_in_short(waiting: Waiting) -> str:
    """`training: 0.7 trainer.train_step; rollouts: 14 generator.generate, 9.8 ticket`: the smallest group first.

    Of each group the two that most wait for.
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
    """Replicas that serve and that there should be, calls under way, mean seconds of a call, and what is special."""
    figures = [each for each in replicas.values() if each["state"] != "stopped"]
    up = sum(each["state"] == "healthy" for each in figures)
    requests = sum(each["requests"] for each in figures)
    busy_s = sum((each["latency_s"] or 0.0) * each["requests"] for each in figures)
    mean = _short(busy_s / requests) if requests else ""
    line = _labelled(name, f"{f'{up}/{len(figures)}':>5}{sum(each['in_flight'] for each in figures):>7}{mean:>8}")
    if up < len(figures):
        states = sorted({each["state"] for each in figures if each["state"] != "healthy"})
        line.append(f"  {', '.join(states)}", style="yellow")
    if count := sum(restarts.get(replica, 0) for replica in replicas):
        line.append(f"  {count} restart{'s' if count > 1 else ''}", style="yellow")
    return line.append("".join(f"  {fact}" for fact in _special(name, metrics)))


def _special(name: str, metrics: Mapping[str, float]) -> Sequence[str]:
    """What one service alone is asked for."""
    if not metrics:
        return ()
    if name == "generator":
        return f"busy {metrics['generator/busy_fraction']:.0%}", tokens_per_s(metrics)
    if name == "trainer":
        return (f"busy {metrics['time/train_step_s'] / metrics['time/step_s']:.0%}",)
    if name == "replay_buffer":
        return (f"{metrics['buffer/groups_waiting']:.0f} groups wait",)
    return ()


def _sample_lines(sample: Sample | None, console: Console, width: int, room: int) -> Sequence[Text]:
    """The prompt, the best and the worst completion: each gets a third of the room, or all that others leave."""
    if sample is None:
        return [_labelled("sample", "none yet: see observe.rollouts_every")]
    best, worst = (choose(range(len(sample.rewards)), key=sample.rewards.__getitem__) for choose in (max, min))
    texts = [("prompt", sample.prompt)]
    if sample.rewards[best] == sample.rewards[worst]:
        texts.append((f"all {sample.rewards[best]:.4g}", sample.completions[best]))
    else:
        texts += [(f"best {sample.rewards[best]:.4g}", sample.completions[best])]
        texts += [(f"worst {sample.rewards[worst]:.4g}", sample.completions[worst])]
    lines = [_labelled("sample", f"after step {sample.step}, one group of {len(sample.rewards)}")]
    for i, (label, text) in enumerate(texts):
        lines += _wrapped(label, text, console, width, max(1, (room - len(lines)) // (len(texts) - i)))
    return lines


def _wrapped(label: str, text: str, console: Console, width: int, most: int) -> Sequence[Text]:
    """At most so many lines; the last ends in an ellipsis where there is more."""
    inner = max(1, width - _LABEL)
    shown = visible(text[: inner * (most + 1)])  # no more than could be shown is wrapped
    lines = list(Text(shown).wrap(console, inner, overflow="fold"))[: most + 1] or [Text()]
    if len(lines) > most:
        lines = lines[:most]
        lines[-1] = Text(f"{lines[-1].plain.rstrip()[: inner - 1]}…")
    return [_labelled("" if i else label, line.plain.rstrip()) for i, line in enumerate(lines)]


def _that_fit(blocks: Sequence[_Block], room: int) -> Sequence[_Block]:
    fit = [block for block in blocks if block.lines]
    while len(fit) > 1 and sum(len(block.lines) for block in fit) > room:
        fit.remove(max(fit, key=lambda block: block.rank))
    return fit


def _labelled(label: str, text: str) -> Text:
    return Text().append(f"{label:<{_LABEL}}", style="dim").append(text)


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

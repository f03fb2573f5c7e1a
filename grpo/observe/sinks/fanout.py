"""Sends numbers to every sink, each in a thread of its own: a training never waits for one, nor ends with it.

What happens on a sink that is slow: its queue fills up, and what finds no room is left out. On one that raises: three
errors in a row switch it off. On one that hangs: it is left behind when the run ends.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

from grpo.errors import ConfigError
from grpo.observe.sinks.base import Sink
from grpo.utils.imports import check_arguments, named_function

log = logging.getLogger(__name__)
_ERRORS_IN_A_ROW = 3
_ROOM = 256  # calls that wait for a sink
Warn = Callable[[str], None]
_Call = tuple[str, tuple[Any, ...]]  # method and arguments


class _Worker:
    """One sink, the queue in front of it and the thread that serves both. The sink is made in the thread, too."""

    def __init__(self, name: str, make: Callable[[], Sink], warn: Warn, room: int) -> None:
        self._name, self._make, self._warn = name, make, warn
        self._calls: deque[_Call] = deque()
        self._room = room
        self._changed = threading.Condition()  # guards the calls and the two below
        self._closing = False
        self._off = False
        self._in_a_row = self.errors = self.left_out = 0
        # A daemon: a sink that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._serve, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def put(self, call: _Call) -> None:
        """Never waits for the sink."""
        with self._changed:
            if self._off or self._closing:
                return
            full = len(self._calls) >= self._room
            if not full:
                self._calls.append(call)
                self._changed.notify()
        if full:
            self.left_out += 1
            if self.left_out == 1:
                self._warn(f"sink {self._name} is too slow: what finds no room in its queue is left out")

    def end(self) -> None:
        """Have it close its sink after what is queued."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """Until it has closed, or for so long; what is queued by then is left out."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._off = True  # should it come back, it only closes
            self._warn(f"sink {self._name} did not close in time and was left behind")

    def _serve(self) -> None:
        sink = self._guarded(self._make)
        if sink is None:
            self._switch_off()
            return
        while call := self._next():
            method, arguments = call
            self._guarded(methodcaller(method, *arguments), sink)  # a sink may lack the method
            if self._in_a_row == _ERRORS_IN_A_ROW:
                self._switch_off()
        self._guarded(methodcaller("close"), sink)

    def _next(self) -> _Call | None:
        """The next call, waited for; None when no more are to be made."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._closing or self._off)
            return self._calls.popleft() if self._calls and not self._off else None

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the call returns; None when it raised: whatever it was, the run goes on."""
        try:
            result = call(*arguments)
        except BaseException as error:  # SystemExit too, which would end the thread unseen
            self.errors += 1
            self._in_a_row += 1
            log.warning("sink %s: %s: %s", self._name, type(error).__name__, error, exc_info=self.errors == 1)
            if self.errors == 1:
                said = str(error).partition("\n")[0]
                self._warn(f"sink {self._name}: {type(error).__name__}: {said}")  # the rest is in the log
            return None
        self._in_a_row = 0
        return result

    def _switch_off(self) -> None:
        with self._changed:
            self._off = True
            self._calls.clear()
        self._warn(f"sink {self._name} is switched off: the training goes on without it")


class Sinks:
    """All sinks of a run behind the calls of one. No call waits or raises; `close` waits `close_s` at most."""

    def __init__(
        self, sinks: Mapping[str, Callable[[], Sink]], warn: Warn, *, room: int = _ROOM, close_s: float = 10.0
    ) -> None:
        """`warn` gets a line for people when something goes wrong, from any thread."""
        self._workers = {name: _Worker(name, make, warn, room) for name, make in sinks.items()}
        self._close_s = close_s

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._put("scalars", step, dict(values))  # copies: the caller may go on with its own

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        self._put("histogram", step, name, list(values))

    def text(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._put("text", step, name, [dict(row) for row in rows])

    def summary(self, values: Mapping[str, Any]) -> None:
        self._put("summary", dict(values))

    def close(self) -> None:
        """Blocks: on an event loop, call it in a thread, or after the loop. A second call does nothing."""
        workers, self._workers = self._workers, {}
        for worker in workers.values():
            worker.end()
        deadline = time.monotonic() + self._close_s
        for worker in workers.values():
            worker.wait(max(0.0, deadline - time.monotonic()))

    def counts(self) -> dict[str, dict[str, int]]:
        """Errors and calls left out, by sink; for the summary, before `close`."""
        return {name: {"errors": w.errors, "left_out": w.left_out} for name, w in self._workers.items()}

    def _put(self, method: str, *arguments: Any) -> None:
        for worker in self._workers.values():
            worker.put((method, arguments))


class Known(NamedTuple):
    """A sink that comes with the project: the package that it needs, and the extra that installs it."""

    target: str
    package: str
    extra: str


SINKS = {
    "tensorboard": Known("grpo.observe.sinks.tensorboard:TensorBoardSink", "tensorboard", "tensorboard"),
    "wandb": Known("grpo.observe.sinks.wandb:WandbSink", "wandb", "wandb"),
    "trackio": Known("grpo.observe.sinks.trackio:TrackioSink", "trackio", "trackio"),
    "ray": Known("grpo.cluster.ray_metrics:RaySink", "prometheus_client", "dashboard"),
}
_KEY = "observe.sinks"


def check_sinks(config_sinks: Mapping[str, Any]) -> dict[str, Callable[..., Sink]]:
    """The class of every sink, by name. Imports nothing heavy.

    Raises ConfigError for an unknown name, a package that is not installed, or options that the class doesn't take.
    """
    classes = {}
    for name, options in config_sinks.items():
        found = named_function(str(name), {name: known.target for name, known in SINKS.items()}, key=_KEY)
        if name in SINKS and importlib.util.find_spec(SINKS[name].package) is None:
            known = SINKS[name]
            raise ConfigError(
                f"{known.package} is not installed: pip install -e '.[{known.extra}]'", key=f"{_KEY}.{name}"
            )
        if not isinstance(options, Mapping):
            raise ConfigError(f"is {options!r}, must be its options, {{}} for none", key=f"{_KEY}.{name}")
        check_arguments(found, options, key=f"{_KEY}.{name}")
        classes[name] = found
    return classes


def make_sinks(
    config_sinks: Mapping[str, Mapping[str, Any]], folder: Path, config: Mapping[str, Any], warn: Warn
) -> Sinks:
    """Start the sinks that are named, for the run in `folder`; raises what `check_sinks` raises.

    They open in threads of their own: one that can't be opened is told and does without, the run goes on.
    """
    classes = check_sinks(config_sinks)
    return Sinks({n: partial(made, folder, config, **config_sinks[n]) for n, made in classes.items()}, warn)

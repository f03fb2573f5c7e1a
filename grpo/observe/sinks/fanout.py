"""Send metrics to every sink, each in its own thread: a sink neither delays the training nor ends it.

A slow sink: its queue fills up, and further calls are dropped. A sink that raises: three errors in a row switch it off.
A sink that hangs: it is abandoned when the run ends.
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
from grpo.observe.sinks.base import Rows, Sink
from grpo.utils.imports import check_arguments, named_function

log = logging.getLogger(__name__)
_KEY = "observe.sinks"
_MAX_ERRORS_IN_A_ROW = 3
_QUEUE_SIZE = 256
Warn = Callable[[str], None]


class KnownSink(NamedTuple):
    """A sink of this package, the library that it needs, and the extra that installs the library."""

    target: str
    package: str
    extra: str


SINKS = {
    "tensorboard": KnownSink("grpo.observe.sinks.tensorboard:TensorBoardSink", "tensorboard", "tensorboard"),
    "wandb": KnownSink("grpo.observe.sinks.wandb:WandbSink", "wandb", "wandb"),
    "trackio": KnownSink("grpo.observe.sinks.trackio:TrackioSink", "trackio", "trackio"),
    "ray": KnownSink("grpo.cluster.ray_metrics:RaySink", "prometheus_client", "dashboard"),
}


def check_sinks(config_sinks: Mapping[str, Any]) -> dict[str, Callable[..., Sink]]:
    """Return the class of every sink by name, without importing the libraries.

    Raises ConfigError for an unknown name, a package that is not installed, or options that the class doesn't take.
    """
    classes = {}
    for name, options in config_sinks.items():
        sink_class = named_function(str(name), {name: known.target for name, known in SINKS.items()}, key=_KEY)
        if name in SINKS and importlib.util.find_spec(SINKS[name].package) is None:
            known = SINKS[name]
            raise ConfigError(
                f"{known.package} is not installed: pip install -e '.[{known.extra}]'", key=f"{_KEY}.{name}"
            )
        if not isinstance(options, Mapping):
            raise ConfigError(f"is {options!r}, must be a mapping of options, {{}} for none", key=f"{_KEY}.{name}")
        check_arguments(sink_class, options, key=f"{_KEY}.{name}")
        classes[name] = sink_class
    return classes


def make_sinks(
    config_sinks: Mapping[str, Mapping[str, Any]], folder: Path, config: Mapping[str, Any], warn: Warn
) -> Sinks:
    """Start the configured sinks for the run in `folder`. Raises the errors of `check_sinks`.

    Each is opened in its thread; one that can't be opened is reported by `warn`, and the run continues without it.
    """
    classes = check_sinks(config_sinks)
    return Sinks({n: partial(made, folder, config, **config_sinks[n]) for n, made in classes.items()}, warn)


class Sinks:
    """All sinks of a run, with the methods of one. No call waits or raises; `close` waits at most `close_s`."""

    def __init__(
        self,
        sinks: Mapping[str, Callable[[], Sink]],
        warn: Warn,
        *,
        queue_size: int = _QUEUE_SIZE,
        close_s: float = 10.0,
    ) -> None:
        """`warn` is called with a line for people when something goes wrong, from any thread."""
        self._workers = {name: _Worker(name, make, warn, queue_size) for name, make in sinks.items()}
        self._close_s = close_s

    # Arguments are copied: the caller may change its own before a sink's turn comes.
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._put("scalars", step, dict(values))

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        self._put("histogram", step, name, list(values))

    def text(self, step: int, name: str, rows: Rows) -> None:
        self._put("text", step, name, [dict(row) for row in rows])

    def summary(self, values: Mapping[str, Any]) -> None:
        self._put("summary", dict(values))

    def close(self) -> None:
        """Close every sink after its queued calls. Blocks: on an event loop, call it in a thread. Idempotent."""
        workers, self._workers = self._workers, {}
        for worker in workers.values():
            worker.end()
        deadline = time.monotonic() + self._close_s
        for worker in workers.values():
            worker.wait(max(0.0, deadline - time.monotonic()))

    def counts(self) -> dict[str, dict[str, int]]:
        """Return errors and dropped calls by sink, for the summary; call it before `close`."""
        return {name: {"errors": w.errors, "left_out": w.dropped} for name, w in self._workers.items()}

    def _put(self, method: str, *arguments: Any) -> None:
        for worker in self._workers.values():
            worker.put(methodcaller(method, *arguments))


class _Worker:
    """One sink with its queue and its thread, in which the sink is made, called and closed."""

    def __init__(self, name: str, make: Callable[[], Sink], warn: Warn, queue_size: int) -> None:
        self._name, self._make, self._warn = name, make, warn
        self._calls: deque[Callable[[Sink], object]] = deque()
        self._queue_size = queue_size
        self._changed = threading.Condition()  # guards the calls and the two flags
        self._closing = False
        self._off = False
        self._errors_in_a_row = self.errors = self.dropped = 0
        # A daemon: a sink that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._serve, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Sink], object]) -> None:
        """Queue a call, or drop it when the queue is full. Never waits for the sink."""
        with self._changed:
            if self._off or self._closing:
                return
            full = len(self._calls) >= self._queue_size
            if not full:
                self._calls.append(call)
                self._changed.notify()
        if full:
            self.dropped += 1
            if self.dropped == 1:
                self._warn(f"sink {self._name} is too slow: calls that find its queue full are dropped")

    def end(self) -> None:
        """Have the thread close its sink after the queued calls."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """Wait until the sink is closed; after `seconds`, abandon it and its queue."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._off = True  # if it ever continues, it only closes
            self._warn(f"sink {self._name} did not close in time and was abandoned")

    def _serve(self) -> None:
        sink = self._attempt(self._make)
        if sink is None:
            self._switch_off()
            return
        while call := self._next():
            self._attempt(call, sink)  # AttributeError too, for a sink without the method
            if self._errors_in_a_row == _MAX_ERRORS_IN_A_ROW:
                self._switch_off()
        self._attempt(methodcaller("close"), sink)

    def _next(self) -> Callable[[Sink], object] | None:
        """Wait for the next call; None when no more are to be made."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._closing or self._off)
            return self._calls.popleft() if self._calls and not self._off else None

    def _attempt(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return the call's result, or None when it raised; the first error is shown, every one is logged."""
        try:
            result = call(*arguments)
        except BaseException as error:  # SystemExit too, which would end the thread unseen
            self.errors += 1
            self._errors_in_a_row += 1
            log.warning("sink %s: %s: %s", self._name, type(error).__name__, error, exc_info=self.errors == 1)
            if self.errors == 1:
                first_line = str(error).partition("\n")[0]
                self._warn(f"sink {self._name}: {type(error).__name__}: {first_line}")
            return None
        self._errors_in_a_row = 0
        return result

    def _switch_off(self) -> None:
        with self._changed:
            self._off = True
            self._calls.clear()
        self._warn(f"sink {self._name} is switched off: the training continues without it")

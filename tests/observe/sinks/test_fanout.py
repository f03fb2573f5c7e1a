import threading
import time
from functools import partial

import pytest

from grpo.observe.sinks.fanout import Sinks


class Remembers:
    """Keeps its calls; waits at a gate and raises on demand."""

    def __init__(self, gate=None, errors=()):
        self.calls, self.threads = [], set()
        self.gate, self.errors = gate, iter(errors)
        self.called = threading.Event()

    def _call(self, *call):
        self.called.set()
        self.threads.add(threading.current_thread().name)
        if self.gate is not None:
            self.gate.wait()
        self.calls.append(call)
        if error := next(self.errors, None):
            raise error

    def scalars(self, step, values):
        self._call("scalars", step, values)

    def histogram(self, step, name, values):
        self._call("histogram", step, name, values)

    def text(self, step, name, rows):
        self._call("text", step, name, rows)

    def summary(self, values):
        self._call("summary", values)

    def close(self):
        self.calls.append(("close",))


def opened(warn=print, **sinks):
    return partial(Sinks, {name: lambda sink=sink: sink for name, sink in sinks.items()}, warn)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith("sink-")])


def test_every_sink_gets_every_call_in_order_and_in_its_own_thread():
    one, two, values = Remembers(), Remembers(), {"loss": 1.0}
    sinks = opened(one=one, two=two)()
    sinks.scalars(1, values)
    values["loss"] = 2.0  # the caller's own
    sinks.histogram(1, "ages", (1, 2))
    sinks.text(1, "samples", [{"prompt": "a"}])
    sinks.summary({"status": "completed"})
    sinks.close()
    sinks.scalars(2, values)
    sinks.close()
    assert one.calls == [
        ("scalars", 1, {"loss": 1.0}),
        ("histogram", 1, "ages", [1, 2]),
        ("text", 1, "samples", [{"prompt": "a"}]),
        ("summary", {"status": "completed"}),
        ("close",),
    ]
    assert one.calls == two.calls
    assert (one.threads, two.threads) == ({"sink-one"}, {"sink-two"})


def test_one_that_keeps_raising_is_switched_off_and_the_others_go_on():
    told, dead, alive = [], Remembers(errors=[OSError("no net\nmore of it")] * 9), Remembers()
    sinks = opened(told.append, dead=dead, alive=alive)()
    for step in range(9):
        sinks.scalars(step, {})
    sinks.close()
    assert [call[0] for call in dead.calls] == ["scalars"] * 3 + ["close"]
    assert len(alive.calls) == 10
    assert told == ["sink dead: OSError: no net", "sink dead is switched off: the training continues without it"]


def test_errors_that_are_not_in_a_row_are_counted_and_told_once():
    told, flaky = [], Remembers(errors=[ValueError(1), SystemExit(2), None] * 3)
    sinks = opened(told.append, flaky=flaky)()
    for step in range(9):
        sinks.scalars(step, {})
    worker = sinks._workers["flaky"]
    sinks.close()
    assert (len(flaky.calls), worker.errors) == (10, 6)
    assert told == ["sink flaky: ValueError: 1"]


def test_one_that_cannot_be_opened_is_done_without():
    told = []

    def broken():
        raise RuntimeError("no key")

    sinks = Sinks({"broken": broken}, told.append)
    sinks.scalars(1, {})
    sinks.close()
    assert told == [
        "sink broken: RuntimeError: no key",
        "sink broken is switched off: the training continues without it",
    ]


def test_one_that_lacks_methods_is_an_error_like_others():
    told = []
    sinks = opened(told.append, bare=object())()
    sinks.scalars(1, {})
    sinks.close()
    assert told == ["sink bare: AttributeError: 'object' object has no attribute 'scalars'"]


def test_a_slow_one_holds_up_nobody_and_what_finds_no_room_is_left_out():
    told, gate = [], threading.Event()
    slow, quick = Remembers(gate), Remembers()
    sinks = opened(told.append, slow=slow, quick=quick)(queue_size=4)
    sinks.scalars(0, {})
    assert slow.called.wait(5)  # it has taken the first one out of its queue
    for step in range(1, 11):
        sinks.scalars(step, {})
        wait_for(lambda step=step: len(quick.calls) > step)
    assert sinks.counts()["slow"] == {"errors": 0, "left_out": 6}
    gate.set()
    sinks.close()
    assert [call[1] for call in slow.calls[:-1]] == [0, 1, 2, 3, 4]
    assert [call[1] for call in quick.calls[:-1]] == list(range(11))
    assert told == ["sink slow is too slow: calls that find its queue full are dropped"]


def test_one_that_hangs_is_left_behind():
    told, gate = [], threading.Event()
    hung = Remembers(gate)
    sinks = opened(told.append, hung=hung, quick=Remembers())(close_s=0.2)
    sinks.scalars(1, {})
    sinks.scalars(2, {})
    assert hung.called.wait(5)
    started = time.perf_counter()
    sinks.close()
    assert time.perf_counter() - started < 2
    assert told == ["sink hung did not close in time and was abandoned"]
    gate.set()
    wait_for(lambda: ("close",) in hung.calls)
    assert len(hung.calls) == 2  # the second was given up


def test_no_sinks_are_no_trouble():
    before = threading.active_count()
    sinks = Sinks({}, print)
    sinks.scalars(1, {})
    sinks.close()
    assert threading.active_count() == before

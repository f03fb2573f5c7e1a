"""Interruptions, and the seam at which a run fails."""

import asyncio
import os
import signal
import threading

import pytest

from grpo.cli.lifecycle import Interrupts, call_beside_event_loop, outcome_of_run
from grpo.utils.aio import Interrupted


def until_stopped(interrupts, said):
    async def work():
        with interrupts.listening(lambda: said.append("stopping")) as shutdown:
            said.append("ready")
            await shutdown.wait()
            said.append("step finished")

    return work()


def test_a_signal_lets_the_work_finish_and_counts_as_an_interruption():
    said = []
    with outcome_of_run() as outcome:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        asyncio.run(until_stopped(Interrupts(), said))
    assert (outcome.status, outcome.error) == ("interrupted", None)
    assert said == ["ready", "stopping", "step finished"]


def test_a_second_request_ends_the_work_at_once():
    interrupts, said = Interrupts(), []

    async def work():
        with interrupts.listening(lambda: said.append("stopping")):
            interrupts.request()
            interrupts.request()
            await asyncio.Event().wait()

    with outcome_of_run() as outcome:
        asyncio.run(work())
    assert (outcome.status, said) == ("interrupted", ["stopping"])


def test_a_request_before_anything_listens_is_not_lost():
    interrupts, said = Interrupts(), []
    interrupts.request()
    with pytest.raises(Interrupted):
        asyncio.run(until_stopped(interrupts, said))
    assert said == ["stopping", "ready", "step finished"]


def test_signal_handlers_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    interrupts = Interrupts()
    interrupts.request()
    with pytest.raises(Interrupted):
        asyncio.run(until_stopped(interrupts, []))
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_is_caught_once_and_logged(caplog):
    with outcome_of_run() as outcome:
        raise ValueError("no luck")
    assert (outcome.status, str(outcome.error)) == ("failed", "no luck")
    assert "no luck" in caplog.text


def test_without_an_event_loop_the_work_stays_in_this_thread():
    assert call_beside_event_loop(Interrupts(), threading.current_thread) is threading.current_thread()


async def test_beside_an_event_loop_the_work_has_a_thread_and_may_run_its_own():
    async def which():
        return threading.current_thread()

    assert call_beside_event_loop(Interrupts(), lambda: asyncio.run(which())) is not threading.current_thread()


async def test_an_interruption_of_a_notebook_cell_asks_the_run_to_stop():
    interrupts, said = Interrupts(), []

    def work():
        with outcome_of_run() as outcome:
            asyncio.run(until_stopped(interrupts, said))
        return outcome.status

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert call_beside_event_loop(interrupts, work) == "interrupted"
    finally:
        signal.signal(signal.SIGINT, before)
    assert said == ["ready", "stopping", "step finished"]

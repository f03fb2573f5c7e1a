import asyncio
import io
import math

from rich.console import Console

from grpo.observe.terminal.display import LiveDisplay, PlainDisplay, make_display
from grpo.observe.terminal.view import RunStatus, Sample
from grpo.types import EvaluationReport


def metrics(step, reward=0.5):
    return {
        "step": step,
        "reward/mean": reward,
        "loss": -0.01,
        "policy_age/mean": 0.5,
        "policy_age/max": 1.0,
        "time/trainer_wait_s": 0.1,
        "time/train_step_s": 0.2,
        "time/step_s": 0.4,
        "buffer/groups_waiting": 0,
        "generator/busy_fraction": 0.5,
        "generator/tokens_per_s": 1234.0,
    }


def evaluation(step, stderr=0.02, pass_at=None):
    return EvaluationReport(step, 8, 0, 0.5, stderr, pass_at or {1: 0.25, 2: 0.5, 4: 0.75}, 32, 320, 0, seconds=2.0)


def console(**kwargs):
    return Console(file=io.StringIO(), width=100, **kwargs)


def test_a_pipe_gets_plain_lines_and_a_terminal_the_live_view():
    assert isinstance(make_display(console(force_terminal=False), 10, 1), PlainDisplay)
    dumb = console(force_terminal=True, _environ={"TERM": "dumb"})  # it can't move its cursor
    assert isinstance(make_display(dumb, 10, 1), PlainDisplay)
    assert isinstance(make_display(console(force_terminal=True), 10, 1), LiveDisplay)


def test_plain_lines_carry_the_numbers_and_no_control_codes():
    screen = console()
    with PlainDisplay(screen, max_steps=10, log_every=1) as display:
        display.step(metrics(3))
        display.warn("look [here]")
    text = screen.file.getvalue()
    assert "step  3/10  reward 0.500  loss -0.0100  age 0.50 (max 1)  trainer wait  25%" in text
    assert "warning: look [here]" in text
    assert "\x1b" not in text


def test_plain_lines_come_every_so_often_and_at_the_end():
    screen = console()
    with PlainDisplay(screen, max_steps=10, log_every=4) as display:
        for step in range(1, 11):
            display.step(metrics(step))
    assert [line.split()[1] for line in screen.file.getvalue().splitlines()] == ["4/10", "8/10", "10/10"]


def test_the_time_left_is_reckoned_from_the_steps_of_this_process(monkeypatch):
    screen, now = console(), [0.0]
    monkeypatch.setattr("grpo.observe.terminal.display.time.perf_counter", lambda: now[0])
    with PlainDisplay(screen, max_steps=110, log_every=1) as display:
        for step in (101, 102):  # resumed behind step 100
            now[0] += 2.0
            display.step(metrics(step))
    assert [line.rpartition("left ")[2] for line in screen.file.getvalue().splitlines()] == ["18 s", "16 s"]


def test_the_live_view_shows_progress_and_the_curve():
    screen = console(force_terminal=True)
    with LiveDisplay(screen, max_steps=2) as display:
        display.step(metrics(1, reward=0.1))
        display.step(metrics(2, reward=0.9))
    text = screen.file.getvalue()
    assert "2/2" in text
    assert "▁█" in text


def test_evaluations_are_shown():
    plain, live = console(), console(force_terminal=True)
    with PlainDisplay(plain, max_steps=10, log_every=4) as display:
        display.evaluated(evaluation(5))
        display.evaluated(evaluation(10, stderr=math.nan, pass_at={1: 0.25}))
    first, second = plain.file.getvalue().splitlines()
    assert first == "held-out reward 0.500 ± 0.020  pass@4 0.750  after step 5"
    assert second == "held-out reward 0.500 ± nan  after step 10"
    with LiveDisplay(live, max_steps=10) as display:
        display.evaluated(evaluation(0))
        display.step(metrics(1))
    assert "after step 0" in live.file.getvalue()


def test_what_was_typed_before_is_wiped_off_the_first_line():
    screen = console(force_terminal=True)
    screen.file.write("echoed")
    with LiveDisplay(screen, max_steps=10):
        pass
    assert screen.file.getvalue().startswith("echoed\r\x1b[2K")


def test_a_warning_is_printed_and_stays_in_view():
    screen = console(force_terminal=True, height=20)
    with LiveDisplay(screen, max_steps=10) as display:
        display.step(metrics(7))
        display.warn("look [here]")
    text = screen.file.getvalue()
    assert "warning: look [here]" in text
    assert "step 7, 0 s ago: look [here]" in text


def test_a_key_shows_the_last_sample_and_hides_it_again():
    screen = console(force_terminal=True)
    with LiveDisplay(screen, max_steps=10) as display:
        display.sampled(Sample(3, "dbca>", ("abcd", "dbca"), (1.0, 0.0)))
        display.press("x")
        display.hide()
        assert "dbca>" not in screen.file.getvalue()
        display.press("s")
        display.show()
        display.hide()
        assert "dbca>" in screen.file.getvalue()
        screen.file.truncate(0)
        display.press("s")
        display.show()
    assert "dbca>" not in screen.file.getvalue()


async def test_the_live_view_looks_at_the_services_and_a_pipe_does_not():
    looks = []

    def look():
        looks.append(1)
        return RunStatus()

    await PlainDisplay(console(), 10, 1).watch(look)
    assert not looks
    watching = asyncio.create_task(LiveDisplay(console(force_terminal=True), 10).watch(look))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert looks
    watching.cancel()

import io
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

from grpo.observe.terminal.view import LastWarning, RunStatus, Sample, View, sparkline, visible, waiting_line
from grpo.types import Transcript, TurnText

METRICS = {
    "step": 60,
    "reward/mean": 0.945,
    "loss": 0.017,
    "policy_age/mean": 1.0,
    "policy_age/max": 1.0,
    "time/trainer_wait_s": 0.1,
    "time/train_step_s": 0.3,
    "time/step_s": 0.4,
    "buffer/groups_waiting": 5,
    "generator/busy_fraction": 0.93,
    "generator/tokens_per_s": 4854.0,
}


def figures(state="healthy", requests=10, in_flight=0, latency_s=0.02):
    return {"state": state, "requests": requests, "failures": 0, "in_flight": in_flight, "latency_s": latency_s}


def glance(**others):
    alone = ("dataloader", "reward", "reference", "evaluator", "checkpointer", "replay_buffer", "trainer")
    generators = {
        "generator-0": figures(requests=30, in_flight=12, latency_s=0.4),
        "generator-1": figures("starting", 0, latency_s=None),
        "generator-2": figures("stopped"),
    }
    return RunStatus(
        {"generator": generators, **{name: {name: figures()} for name in alone}},
        {"generator-0": 1, "generator-1": 1},
        {
            ("rollouts", "generator.generate"): 14.2,
            ("rollouts", "ticket"): 9.83,
            ("training", "trainer.train_step"): 0.7,
        },
        **others,
    )


@pytest.fixture
def view():
    view = View(max_steps=150)
    view.start()
    view.trained(METRICS, sparkline([i / 60 for i in range(60)]))
    view.held_out = "0.500 ± 0.020  after step 50"
    view.status = glance()
    view.last_warning = LastWarning(
        "no checkpoint of step 50: the disk is full, " + "so " * 40, 50, time.perf_counter() - 12
    )
    view.sample = Sample(58, "which?\n" * 30, ("right " * 90, "\x1b[2Jwrong", "漢字" * 200), (1.0, 0.25, 0.0))
    view.help = True
    return view


def drawn(view, width=100, height=40):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(view)
    return console.file.getvalue().splitlines()


def test_every_service_has_a_line(view):
    lines = drawn(view)
    assert "generator       1/2     12  400 ms  starting  2 restarts  busy 93%  4,854 tokens/s" in lines
    assert "reward          1/1      0   20 ms" in lines
    assert "replay_buffer   1/1      0   20 ms  5 groups waiting" in lines
    assert "trainer         1/1      0   20 ms  busy 75%" in lines


def test_the_numbers_the_waits_and_the_last_warning_are_in_view(view):
    text = "\n".join(drawn(view))
    assert "60/150" in text
    assert "loss          +0.0170  age 1.00 (max 1)  trainer wait  25%" in text
    assert "held-out      0.500 ± 0.020  after step 50" in text
    assert "waiting       training: 0.7 trainer.train_step; rollouts: 14 generator.generate, 9.8 ticket" in text
    assert "warning       step 50, 12 s ago: no checkpoint of step 50" in text
    assert "s: last samples" in text


@pytest.mark.parametrize("shows_sample", [False, True])
@pytest.mark.parametrize(("width", "height"), [(60, 15), (60, 40), (80, 24), (30, 8), (200, 60), (100, 1)])
def test_it_never_has_more_lines_or_longer_ones_than_the_terminal(view, width, height, shows_sample):
    view.shows_sample = shows_sample
    lines = drawn(view, width, height)
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width


def test_the_end_of_the_curve_is_in_view_however_narrow_the_terminal(view):
    curve = drawn(view, 40)[1]
    assert curve.startswith("reward        0.945")
    assert curve.endswith("█")
    assert len(curve) == 40


def test_what_matters_less_goes_first_where_there_is_little_room(view):
    text = "\n".join(drawn(view, 60, 15))
    for kept in ("60/150", "0.945", "loss", "generator ", "trainer ", "warning"):
        assert kept in text
    assert "s: last samples" not in text
    assert "step" in drawn(view, 60, 1)[0]


def test_samples_take_the_place_of_the_services_and_all_the_room_there_is(view):
    view.shows_sample = True
    lines = drawn(view, 60, 24)
    assert len(lines) == 24
    text = "\n".join(lines)
    assert "trainer  " not in text
    assert "sample        after step 58, one group of 3" in lines
    assert any(line.startswith("prompt        which?\\nwhich?") for line in lines)
    assert any(line.startswith("best 1        right right") for line in lines)
    assert any(line.startswith("worst 0       漢字漢字") for line in lines)
    assert text.count("…") == 4  # the three texts and the warning: all are cut


def test_what_a_completion_holds_can_do_nothing_to_the_terminal(view):
    view.shows_sample = True
    view.sample = Sample(58, "[bold]a[/bold]", ("\x1b[2J\r\t\u202ex",), (0.0,))
    text = "\n".join(drawn(view))
    assert "prompt        [bold]a[/bold]" in text
    assert "all 0         \\x1b[2J\\r\\t\\u202ex" in text
    assert visible("é漢") == "é漢"


@pytest.fixture
def game():
    turns = [TurnText("16", "<", 0.0, "stop", 3, 1), TurnText("8", ">", 0.25, "stop", 2, 1)]
    return Transcript((*turns, TurnText("12", "", 1.0, "stop", 3, 0)), "done")


def test_an_episode_is_a_conversation(view, game):
    view.shows_sample = True
    cut_off = Transcript(tuple(TurnText(f"{n}", "\x1b[2J", 0.0, "stop", 3, 1) for n in range(50)), "turns")
    view.sample = Sample(58, "23:", ("", ""), (1.0, 0.0), (game, cut_off))
    lines = drawn(view, 60, 30)
    begin = lines.index("best 1        3 turns, done")
    assert lines[begin + 1 : begin + 6] == [
        "  1           16",
        "  given       <",
        "  2 +0.25     8",
        "  given       >",
        "  3 +1        12",
    ]
    begin = lines.index("worst 0       50 turns, limit: turns")
    assert lines[begin + 1 : begin + 3] == ["  1           0", "  given       \\x1b[2J"]
    assert "              …" in lines[begin:]
    assert "  50          49" in lines[begin:]
    assert len(lines) == 30


@pytest.mark.parametrize("height", range(4, 40, 3))
def test_a_conversation_has_no_more_lines_than_there_is_room(view, game, height):
    view.shows_sample = True
    view.sample = Sample(58, "23:", ("", ""), (1.0, 0.0), (game, Transcript(game.turns * 20, "tokens")))
    assert len(drawn(view, 60, height)) <= height


def test_before_the_first_step_there_is_the_progress_and_whoever_is_up():
    view = View(max_steps=150)
    assert [line.split()[:2] for line in drawn(view)] == [["step", "0/150"]]
    view.status, view.shows_sample = glance(), True
    assert any(line.startswith("sample        none yet") for line in drawn(view))
    view.shows_sample = False
    assert "trainer         1/1      0   20 ms" in drawn(view)


def test_the_two_waits_of_each_group_that_matter_most_are_told():
    waiting = {("a", "x"): 0.04, ("a", "y"): 0.06, ("b", "x"): 1.0, ("b", "z"): 120.4, ("b", "w"): 0.5}
    assert waiting_line(waiting) == "a: 0.1 y; b: 120 z, 1.0 x"


def test_sparkline_spans_its_own_range_and_survives_a_flat_line():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.3, 0.3]) == "▁▁"
    assert len(sparkline([0.1] * 500)) < 60

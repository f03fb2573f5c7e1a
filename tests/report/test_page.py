"""The page in a real browser, from a file and without a network."""

import pytest

from grpo.report.page import write_report
from tests.report.made_runs import NASTY, make_failed_run, make_run

CHARTS = "[...document.querySelectorAll('.card:not([hidden]) .plot')]"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report([make_run(tmp_path_factory.mktemp("runs") / "one")])


def test_the_overview(browser, report):
    browser.open(report)
    assert browser.text("#status") == "failedafter 12 steps in 30.0 s"
    assert browser.text("#error") == "StalledError: <b>no step</b>"
    assert "0.05 → 0.60" in browser.text("#tiles")
    assert "trainer waits" in browser.text("#shares")
    assert browser.evaluate("[...document.querySelectorAll('#failures tbody tr')].map(row => row.innerText)") == [
        "generator\t14.5 s\t5\t2.00 s\t500 ms\tkilled",
        "reward-1\t14.8 s\t5\t–\t250 ms\t<b>hung</b>",
    ]
    assert browser.text("#config-text").startswith("rollout:")
    assert browser.text("#nav") == "OverviewCurvesEvent loopGroups"


def test_every_chart_is_drawn(browser, report):
    browser.open(report, height=9000)
    browser.until(f"{CHARTS}.every(plot => plot.data?.length)")
    assert browser.evaluate(f"{CHARTS}.length") >= 15
    reward = "document.querySelector('.plot')"
    assert browser.evaluate(f"{reward}.data.map(trace => trace.name)") == [
        "all rollouts",
        "batch",
        "batch, averaged",
        "held-out",
    ]
    assert browser.evaluate(f"{reward}.data[3].error_y.array") == [0.02, 0]
    assert browser.evaluate(f"{reward}.layout.annotations.map(mark => [mark.text, mark.x])") == [
        ["generator died", 4.5],
        ["reward-1 died", 4.75],
        ["resumed", 2],
    ]
    assert browser.evaluate(f"{reward}.layout.shapes.map(shape => [shape.type, shape.x0, shape.x1])") == [
        ["line", 4.5, 4.5],
        ["rect", 4.5, 6.5],  # the other was never replaced
        ["line", 4.75, 4.75],
        ["line", 2, 2],
    ]
    browser.click("#axis button:last-child")
    assert browser.evaluate(f"{reward}.data[1].x[0]") == 11


def test_the_theme_follows_the_system_and_the_button(browser, report):
    browser.prefer("dark")
    browser.open(report)
    dark = "document.documentElement.dataset.theme"
    ink = "document.querySelector('.plot').layout.font.color"
    browser.until("document.querySelector('.plot').layout")
    before = browser.evaluate(ink)
    assert browser.evaluate(dark) == "dark"
    browser.prefer("light")
    browser.until(f"{dark} === 'light' && {ink} !== '{before}'")
    browser.click("#theme")
    assert (browser.evaluate(dark), browser.evaluate(ink)) == ("dark", before)
    browser.evaluate("localStorage.clear()")


def test_groups_are_text_and_never_html(browser, report):
    browser.open(report)
    assert browser.text(".completion:last-child .text") == NASTY
    assert NASTY in browser.text(".ask")
    assert browser.evaluate("document.title") != "taken"
    assert browser.evaluate("document.querySelectorAll('#group b').length") == 2  # the two rewards


def test_groups_are_searched_filtered_and_walked_through(browser, report):
    browser.open(report)
    assert browser.text("#groups-count") == "6 of 6"
    browser.choose("#groups-kind", "mixed")
    assert browser.text("#groups-count") == "3 of 6"
    browser.evaluate("document.getElementById('groups-list').focus()")
    for key, shown in (("j", "prompt 3"), ("ArrowDown", "prompt 1"), ("j", "prompt 1"), ("k", "prompt 3")):
        browser.press(key)
        assert browser.text(".ask").startswith(shown)
    browser.choose("#groups-search", "FIRST 3")
    assert browser.text("#groups-count") == "1 of 6"
    assert browser.text(".completion mark") == "first"
    browser.choose("#groups-search", "nowhere")
    assert browser.text("#group") == "No group matches."


def test_scores_stand_beside_a_completion(browser, report):
    browser.open(report)
    assert browser.text(".completion:last-child .score") == "0task 0format 0.25shaped -0.5−0.70 adv."


def test_tokens_are_coloured_where_there_are_any(browser, report):
    browser.open(report)
    colours = "[...document.querySelectorAll('.token')].map(token => token.style.background)"
    by_logprob = browser.evaluate(colours)
    assert len(by_logprob) == len(set(by_logprob)) == 3
    assert "log-probability -3.000 (5.0%), policy version 5" in browser.evaluate(
        "document.querySelectorAll('.token')[1].title"
    )
    browser.click("#group h3 .toggle button:nth-child(2)")
    by_version = browser.evaluate(colours)
    assert by_version[0] == by_version[2] != by_version[1]
    assert "version 4version 5" in browser.text("#group")
    browser.evaluate("goToGroup(1)")  # one without tokens
    assert browser.evaluate(colours) == []


def texts(browser, selector):
    return browser.evaluate(f"[...document.querySelectorAll('{selector}')].map(each => each.textContent)")


def test_an_episode_is_a_conversation(browser, tmp_path):
    browser.open(write_report([make_run(tmp_path / "run", episodes=True)]))
    assert "2 episodes of 1.5 turns on average" in browser.text("#group h3.group-top")
    assert texts(browser, ".turn > small") == ["1", "2", "1"]
    assert texts(browser, ".sampled") == ["16<eos>", NASTY, "16<eos>"]
    assert texts(browser, ".given") == ["<"]
    assert texts(browser, ".earned") == ["0", "−0.50", "cut off", "+1.00"]
    assert texts(browser, ".turns > .pill") == ["limit: tokens", "done"]
    assert texts(browser, ".token") == ["16", "<eos>", NASTY, "16", "<eos>"]  # what was given has no colour
    browser.click("#group h3 .toggle button:nth-child(2)")
    assert texts(browser, "#group .dots li") == ["version 4", "version 5"]
    browser.click("#group h3 .toggle button:nth-child(3)")
    assert texts(browser, ".sampled") == ["16", NASTY, "16"]
    browser.choose("#groups-kind", "limits")
    assert browser.text("#groups-count") == "1 of 7"
    browser.choose("#groups-search", "16")
    assert texts(browser, ".sampled mark") == ["16", "16"]


def test_episodes_have_charts(browser, report, tmp_path):
    block = "[...document.querySelectorAll('#charts > div')].at(-1)"
    browser.open(report)
    assert browser.evaluate(f"{block}.hidden")
    browser.open(write_report([make_run(tmp_path / "run", episodes=True)]), height=9000)
    browser.until(f"{CHARTS}.every(plot => plot.data?.length)")
    cards = f"[...{block}.querySelectorAll('.card:not([hidden])')]"
    assert browser.evaluate(f"{cards}.map(card => card.querySelector('h4').textContent)") == [
        "Turns", "Tokens", "Ended by a limit", "Time spent waiting", "Reported by the environment",
    ]  # fmt: skip
    own = f"{cards}.at(-1).querySelector('.plot').data"
    assert browser.evaluate(f"{own}.map(trace => [trace.name, trace.y.slice(0, 3)])") == [
        ["&lt;b&gt;moves&lt;/b&gt;", [7, None, 7]]
    ]


def test_the_loop_goes_step_by_step(browser, report):
    browser.open(report)
    browser.evaluate("goToSwitch(0)")
    assert browser.text("#loop-said").startswith(
        "rollouts-0 (ticket 0) was resumed from a ticket after 90 µs, ran for 10 µs and yielded at generator.generate."
    )
    assert browser.text("#loop-others") == "rollouts-1 waits for a ticket80 µs"
    browser.click("#loop-step")
    browser.click("#loop-step")
    assert browser.text("#loop-said").startswith("rollouts-0 (ticket 0) was resumed from generator.generate")
    browser.evaluate("document.getElementById('canvas').focus()")
    browser.press("ArrowLeft")
    assert browser.text("#loop-said").startswith("rollouts-1 (ticket 1) was resumed from a ticket")
    browser.press("n")
    assert "Switch 3 of" in browser.text("#loop-said")


def test_the_loop_plays_and_is_scrubbed(browser, report):
    browser.open(report)
    browser.choose("#loop-speed", "0.01")
    browser.evaluate("goToSwitch(0)")
    browser.click("#loop-play")
    browser.until("Loop.at > 400")
    assert browser.text("#loop-play") == "Pause"
    browser.until("!Loop.playing")  # at the end
    assert browser.evaluate("Loop.at === Loop.timeline.end")
    browser.choose("#loop-scrub", "5000")
    assert browser.evaluate("Math.abs(Loop.at - Loop.timeline.end / 2) < 2")
    window = browser.evaluate("Loop.window")
    browser.click("#loop-in")
    assert browser.evaluate("Loop.window") == window / 2


def test_the_lanes_are_painted(browser, report):
    browser.open(report)
    canvas = "document.getElementById('canvas')"
    pixels = f"{canvas}.getContext('2d').getImageData(0, 0, {canvas}.width, {canvas}.height)"
    assert browser.evaluate(f"{pixels}.data.some(Boolean)")


def test_what_a_run_lacks_is_left_out(browser, tmp_path):
    browser.open(write_report([make_run(tmp_path / "bare", groups=False, timeline=False, summary=False)]))
    assert browser.text("#nav") == "OverviewCurves"
    assert "still running" in browser.text("#status")


def test_a_run_of_one_step(browser, tmp_path):
    browser.open(write_report([make_run(tmp_path / "short", steps=1)]), height=9000)
    browser.until(f"{CHARTS}.every(plot => plot.data)")


def test_a_narrow_window_has_no_sideways_scrolling(browser, report):
    browser.open(report, width=360)
    assert browser.evaluate("document.documentElement.scrollWidth") == 360


def test_runs_side_by_side(browser, tmp_path):
    for n in (1, 4, 16):
        typed = [f"rollout.concurrency={n}"]
        make_run(tmp_path / "sweep" / str(n), concurrency=n, timeline=False, overrides=typed)
    make_failed_run(tmp_path / "sweep" / "0", ["rollout.concurrency=0"])
    (tmp_path / "sweep" / "multirun.yaml").write_text("")
    browser.open(write_report(sorted((tmp_path / "sweep").iterdir())), height=6000)
    assert browser.text("#title").endswith("/sweep: 4 runs")
    assert browser.evaluate("document.querySelector('#runs-table tbody tr').innerText").startswith("0\tfailed\t0\t0\t–")
    assert "0 · concurrency=0: never started" in browser.text("#error")
    assert "rollout.concurrency" in browser.text("#runs-table thead")
    browser.until(f"{CHARTS}.every(plot => plot.data?.length)")
    sweep = "document.querySelector('#sweep .plot').data[0]"
    assert browser.evaluate(f"{sweep}.x") == [1, 4, 16]
    assert browser.evaluate(f"{sweep}.y[0] < {sweep}.y[2]")
    names = browser.evaluate("[...document.querySelectorAll('#charts .plot')].at(-1).data.map(trace => trace.name)")
    assert names == ["1 · concurrency=1", "4 · concurrency=4", "16 · concurrency=16"]

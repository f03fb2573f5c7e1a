"""A run that goes on, served and watched in a real browser."""

import json
import threading
import urllib.request
from contextlib import contextmanager

import pytest

from grpo.errors import ReportError
from grpo.report.serve import LiveRun, ReportServer
from tests.report.made_runs import events, make_failed_run, make_run

HURRY = "Live.every = 50; void ask()"


@contextmanager
def serving(folder):
    with ReportServer(LiveRun(folder), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def going_on(folder, *, steps, groups, timeline):
    """A run that is just writing to all of its files."""
    make_run(folder, steps=steps, groups=groups, summary=False)
    for name in ("metrics.jsonl", "rollouts.jsonl", "events.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 99, "wal')
    text = ",\n".join(json.dumps(event) for event in events(timeline))
    (folder / "timeline.json").write_text(f'[\n{text},\n{{"ph": "X", "na')


def ask(url):
    with urllib.request.urlopen(url, timeout=120) as answer:
        return answer.status, answer.read()


def test_a_run_is_watched_from_before_its_first_step_to_its_end(browser, tmp_path):
    folder = tmp_path / "run"
    make_failed_run(folder, ())
    with serving(folder) as url:
        browser.open(url)
        assert browser.text("#status") == "livewaiting for the first train step: the run is starting"
        browser.evaluate(HURRY)
        going_on(folder, steps=3, groups=2, timeline=1)
        browser.until("typeof Loop !== 'undefined' && Loop.timeline && RUNS[0]?.columns.step.length === 3")
        browser.until("document.readyState === 'complete'")
        assert browser.text("#status").startswith("liveafter 3 steps")

        browser.evaluate(f"{HURRY}; window.same = true; goToGroup(1); goTo(500)")
        browser.evaluate("document.getElementById('groups').scrollIntoView({behavior: 'instant'})")
        top = "document.getElementById('group').getBoundingClientRect().top"
        shown, before = browser.text(".ask"), browser.evaluate(top)
        assert browser.text("#group-place") == "2 of 2"
        going_on(folder, steps=12, groups=6, timeline=3)
        browser.until("RUNS[0].columns.step.length === 12 && Loop.timeline.spans.length > 20")
        assert browser.evaluate("window.same")  # never loaded anew
        assert (browser.text(".ask"), browser.text("#group-place")) == (shown, "6 of 6")
        assert browser.evaluate("document.querySelector('[aria-selected=true]').id") == "row-5"
        assert browser.evaluate("Loop.at") == 500
        assert abs(browser.evaluate(top) - before) < 2

        make_run(folder)
        browser.until("!DATA.live")
        assert browser.text("#status") == "failedafter 12 steps in 30.0 s"
        assert browser.text("#error") == "StalledError: <b>no step</b>"


def test_a_page_whose_server_is_gone_says_so(browser, tmp_path):
    folder = tmp_path / "run"
    going_on(folder, steps=3, groups=2, timeline=1)
    with serving(folder) as url:
        browser.open(url)
        browser.evaluate(HURRY)
    browser.until("document.getElementById('live').textContent === 'the server does not answer'")
    browser.leave()  # it tells of each request that failed by itself


def test_data_is_sent_only_when_something_is_new(tmp_path):
    going_on(tmp_path / "run", steps=3, groups=2, timeline=1)
    with serving(tmp_path / "run") as url:
        status, text = ask(f"{url}data")
        stamp = json.loads(text)["live"]["stamp"]
        assert status == 200
        assert ask(f"{url}data?stamp={stamp}") == (204, b"")
        going_on(tmp_path / "run", steps=4, groups=2, timeline=1)
        status, text = ask(f"{url}data?stamp={stamp}")
        assert (status, json.loads(text)["runs"][0]["columns"]["step"]) == (200, [1, 2, 3, 4])
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(f"{url}run/config.yaml")


def test_a_run_that_failed_before_its_first_step_is_told(tmp_path):
    make_failed_run(tmp_path / "run", ())
    (tmp_path / "run" / "summary.json").write_text('{"status": "failed", "error": "LaunchError: no room"}')
    data = LiveRun(tmp_path / "run").data()
    assert (data["waiting"], data["live"]) == ("no step was trained: LaunchError: no room", None)


def test_a_timeline_that_fills_the_page_is_read_once_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.report.serve.MOST_SPANS", 5)
    run = tmp_path / "run"
    going_on(run, steps=3, groups=2, timeline=1)
    live = LiveRun(run)
    first = len(live.data()["timeline"]["spans"])
    going_on(run, steps=4, groups=2, timeline=3)
    assert len(live.data()["timeline"]["spans"]) == first
    make_run(run)
    assert len(live.data()["timeline"]["spans"]) > first


def test_a_port_in_use_is_one_line(tmp_path):
    make_run(tmp_path / "run")
    with serving(tmp_path / "run") as url:
        port = int(url.rstrip("/").rpartition(":")[2])
        with pytest.raises(ReportError, match=f"^port {port} is in use; name another with --port, or 0"):
            ReportServer(LiveRun(tmp_path / "run"), "127.0.0.1", port)

import pytest

from tests.report.browser import CHROMIUM, Browser


@pytest.fixture(scope="session")
def one_browser(tmp_path_factory):
    """Starting it takes seconds."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium or Chrome")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(one_browser):
    """No console error is ever fine."""
    yield one_browser
    one_browser.evaluate("new Promise(done => setTimeout(done, 50))")
    assert not one_browser.console

"""The server's page in a real browser: type, watch it stream, fork, see the state's size stay.

Run by `make test-page`, which installs playwright; the browser is the system's Chromium.
"""

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.serving import make_run, served


@pytest.fixture
def page():
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "no Chromium here: install it, e.g. `apt-get install chromium`"
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        with playwright.chromium.launch(executable_path=browser, args=options) as chromium:
            yield chromium.new_page(viewport={"width": 390, "height": 844})


def _number(page: Page, name: str) -> int:
    return int(page.inner_text(f"#{name}").replace(",", ""))


def _go_on(page: Page, prompt: str, length: int, expected: int) -> None:
    page.fill("#prompt", prompt)
    page.fill("#length", str(length))
    page.click("#go")
    shown = expected if expected < 1000 else f"{expected:,}"
    page.wait_for_function(f"document.getElementById('symbols').textContent === '{shown}'")
    page.wait_for_selector("#go:enabled")


def test_the_page(page: Page, tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    with served(run, keys=["secret"]) as (address, service):
        page.goto(address)
        page.wait_for_function("document.getElementById('problem').textContent !== ''")
        assert "API key" in page.inner_text("#problem")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.wait_for_function("document.getElementById('model').textContent === 'tiny'")
        _go_on(page, "abc", 400, 403)
        size = _number(page, "bytes")
        assert size == service.worker.engine.state_bytes
        text = page.inner_text("#text")
        assert text.startswith("abc")
        _go_on(page, "", 1000, 1403)
        assert _number(page, "bytes") == size
        assert page.inner_text("#text").startswith(text[:300])
        page.click("#fork")
        page.wait_for_function("document.getElementById('session').value !== 'page'")
        _go_on(page, "h", 10, 1414)
        # a stop leaves the session as it was
        page.fill("#length", "100000")
        page.fill("#prompt", "a")
        page.click("#go")
        page.wait_for_selector("#stop:enabled")
        page.click("#stop")
        page.wait_for_selector("#go:enabled")
        assert "stopped" in page.inner_text("#text")
        _go_on(page, "a", 10, 1425)
        page.fill("#prompt", "Z")
        page.click("#go")
        page.wait_for_function("document.getElementById('problem').textContent.includes('Z')")
        # nothing is wider than the screen of a phone
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        page.click("#forget")
        page.wait_for_function("document.getElementById('symbols').textContent === '0'")
        assert len(service.sessions.names(_owner())) == 1
    assert not problems


def _owner() -> str:
    from minrnn.serve.app import _owner

    return _owner("secret")

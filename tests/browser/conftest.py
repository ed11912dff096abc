"""A real browser for the pages: headless Chromium out of ``scripts/browser.py``, driven by Playwright."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

PACKAGED = Path(sys.prefix) / "browser"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def find_browser() -> Path:
    """The packaged browser, else one of the machine; ``TEST_BROWSER`` overrides both."""
    if named := os.environ.get("TEST_BROWSER"):
        return Path(named)
    if (PACKAGED / "chromium").exists():
        return PACKAGED / "chromium"
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found or MAC.exists():
        return Path(found or MAC)
    pytest.fail(f"no browser: run `python scripts/browser.py`, set TEST_BROWSER, or put one of {', '.join(NAMES)} on the PATH")


def environment(program: Path) -> dict[str, str]:
    """The package's own libraries and fonts where the machine lacks them: a bare one has no NSS, and no fonts at all."""
    env = dict(os.environ)
    if program.parent == PACKAGED:
        needs = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
        if "not found" in needs:
            env["LD_LIBRARY_PATH"] = str(PACKAGED / "lib")
        if not shutil.which("fc-list") and not Path("/usr/share/fonts").is_dir():
            env["FONTCONFIG_PATH"] = str(PACKAGED)
    return env


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A running browser; not for the whole session, for while Playwright runs no other test of the process may start an event loop."""
    program = find_browser()
    with sync_playwright() as playwright:
        # No sandbox: containers and root forbid it, and the pages are our own. Sound may play without a click.
        options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--mute-audio"]
        running = playwright.chromium.launch(executable_path=program, args=options, env=environment(program))
        yield running
        running.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A window of its own for a test, without a network."""
    opened = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True, locale="en")
    yield opened
    opened.close()

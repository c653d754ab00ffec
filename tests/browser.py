"""A real browser for pages under test: Debian's Chromium (`apt-get install chromium`), driven by playwright."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """While it lasts, there is a browser; where there is none, the tests that want it are left out."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


def note_faults(page: Page) -> list[str]:
    """The errors and warnings of a page, those of its policy among them, as they come."""
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
    page.on("requestfailed", lambda request: faults.append(f"not loaded: {request.url}"))
    return faults


def visit(browser: Browser, file: Path, script: str, width: int = 1280, height: int = 900) -> dict:
    """Opens a page from its file, runs a script in it, and says what came of it.

    Args:
        browser (`Browser`): From `chromium`.
        file (`Path`): An HTML file.
        script (`str`): The body of an async function of `window`, `document` and `settle`, where `await settle()`
            waits until the page has drawn. It returns something that JSON can hold.
        width, height (`int`): Of the window, in CSS pixels.

    Returns:
        `dict`: `value`, what the script returned; `faults`, the page's errors and warnings; `requests`, the addresses
        of all that it loaded.
    """
    page = browser.new_page(viewport={"width": width, "height": height})
    faults, requests = note_faults(page), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    value = page.evaluate(
        f"""async () => {{
            const settle = () => new Promise((resolve) => setTimeout(resolve, 150));
            await settle();
            const value = await (async () => {{ {script} }})();
            await settle();
            return value;
        }}"""
    )
    page.close()
    others = [url for url in requests if url != file.as_uri() and not url.startswith("data:")]
    return {"value": value, "faults": faults, "requests": others}

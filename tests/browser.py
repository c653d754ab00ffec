"""A real browser for pages under test: the Chromium in the PyPI package kaleido 0.2.1, which needs nothing else."""

import importlib.util
import json
import subprocess
from pathlib import Path


# kaleido opens a page of its own with this in place of plotly.js, and returns what its `toImage` makes.
_DRIVER = """
window.Plotly = {
  version: "2.0.0",
  toImage: async ({ data: [{ page, script, width, height }] }) => {
    const element = Object.assign(document.createElement("iframe"), { width, height, src: page });
    const loaded = new Promise((resolve) => { element.onload = resolve; });
    document.body.append(element);
    await loaded;
    const window = element.contentWindow;
    const settle = () => new Promise((resolve) => setTimeout(resolve, 150));
    await settle();
    const run = new (async () => {}).constructor("window", "document", "settle", script);
    const value = await run(window, window.document, settle);
    await settle();
    const requests = window.performance.getEntriesByType("resource").map((entry) => entry.name);
    return JSON.stringify({ value, faults: window.faultsUnderTest, requests });
  },
};
"""

# Before anything of the page runs: what goes wrong is noted, and what its policy forbids it to load.
_NOTES = """<script>
var faultsUnderTest = [];
addEventListener("error", (event) => faultsUnderTest.push(event.message || `not loaded: ${event.target.src}`), true);
addEventListener("unhandledrejection", (event) => faultsUnderTest.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => faultsUnderTest.push(`blocked: ${event.blockedURI}`));
for (const level of ["error", "warn"]) console[level] = (...what) => faultsUnderTest.push(what.join(" "));
</script>"""


def visit(page: Path, script: str, width: int = 1280, height: int = 900) -> dict:
    """Opens a page from its file, runs a script beside it, and says what came of it.

    Args:
        page (`Path`): An HTML file with a `<head>`.
        script (`str`): The body of an async function of `window`, `document` and `settle`, where `await settle()`
            waits until the page has drawn. It returns something that JSON can hold.
        width, height (`int`): Of the window, in CSS pixels.

    Returns:
        `dict`: `value`, what the script returned; `faults`, the page's errors and warnings; `requests`, the addresses
        of all that it loaded.

    Raises:
        RuntimeError: If there is no browser, or if it or the script fails.
    """
    package = importlib.util.find_spec("kaleido")
    program = Path(package.origin).with_name("executable") / "kaleido" if package else None
    if program is None or not program.exists():
        raise RuntimeError("This needs the browser in kaleido 0.2.1: pip install -e '.[test]'")
    driver, copy = page.with_name("driver.js"), page.with_name("noted.html")
    driver.write_text(_DRIVER)
    copy.write_text(page.read_text().replace("<head>", f"<head>{_NOTES}", 1))
    job = {"page": copy.as_uri(), "script": script, "width": width, "height": height}
    done = subprocess.run(
        [
            *(program, "plotly", f"--plotlyjs={driver.as_uri()}", "--disable-gpu", "--no-sandbox"),
            *("--allow-file-access-from-files", "--disable-dev-shm-usage"),
        ],
        input=json.dumps({"format": "svg", "data": {"data": [job], "layout": {}}}) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if len(answers) < 2 or answers[1]["code"]:
        raise RuntimeError(f"The browser failed: {answers[1:]} {done.stderr}")
    return json.loads(answers[1]["result"])

"""A page in headless Chromium, in a frame of any width: what a script finds there, and what the console says."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const found = () => {%s};
addEventListener("load", () => setTimeout(() => parent.postMessage(JSON.stringify(found()), "*"), 500));
</script></body>"""
FRAME = """<!doctype html><title>nothing</title><script>onmessage = (event) => { document.title = event.data }</script>
<iframe width="%d" height="900" style="border: 0" src="probed.html"></iframe>"""


def probe(page: str, width: int, script: str, folder: Path) -> tuple[Any, list[str]]:
    """What ``script``, the body of a function, returns on the page once it is drawn, and the lines of the console.

    A window of Chromium's has at least 500 pixels, a frame in it has any number.
    """
    (folder / "probed.html").write_bytes(page.replace("</body>", PROBE % script).encode("utf-8", "xmlcharrefreplace"))
    (folder / "frame.html").write_text(FRAME % width)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--virtual-time-budget=8000",
    ]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *options, profile, "--window-size=1400,900", "--dump-dom", (folder / "frame.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = html.unescape(re.search(r"<title>(.*?)</title>", result.stdout, re.DOTALL)[1])
    return json.loads(title), [line for line in result.stderr.splitlines() if "CONSOLE" in line]

"""Chromium without a window: a page's DOM, what it wrote to the console, and what it asked the network for."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
)  # fmt: skip
OWN_SERVICES = r"https?://([\w-]+\.)*(google|gstatic|googleapis|gvt1|chromium)\.(com|org)[/:]"


@dataclass(frozen=True, kw_only=True)
class Opened:
    dom: str
    console: list[str]
    requests: list[str]
    """URLs that are not of this disk, nor of the browser's own services."""


def open_page(page: Path, scratch: Path) -> Opened:
    log, profile = scratch / "net.json", scratch / "profile"
    result = subprocess.run(
        [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", f"--log-net-log={log}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    net = json.loads(log.read_text())
    urls = {event.get("params", {}).get("url", "") for event in net["events"] if isinstance(event.get("params"), dict)}
    console = [line for line in result.stderr.splitlines() if re.search(r":CONSOLE[:(]", line)]
    asked = {url for url in urls if re.match(r"(https?|wss?):", url) and not re.match(OWN_SERVICES, url)}
    return Opened(dom=result.stdout, console=console, requests=sorted(asked))

"""A headless Chromium over its pipe: messages are JSON ended by NUL on file descriptors 3 and 4."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Browser", "Page"]

BINARY = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One browser process; a context manager. Skips the test where there is no Chromium."""

    def __init__(self) -> None:
        if not shutil.which(BINARY):
            pytest.skip("needs Chromium")
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        low_in, self.out = os.pipe()
        self.inp, low_out = os.pipe()
        # The shell gives the pipes the numbers that Chromium expects; out of the way of 3 and 4 until then.
        to_child, from_child = fcntl.fcntl(low_in, fcntl.F_DUPFD, 60), fcntl.fcntl(low_out, fcntl.F_DUPFD, 60)
        os.close(low_in)
        os.close(low_out)
        script = f'exec "$@" 3<&{to_child} 4>&{from_child} {to_child}<&- {from_child}>&-'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "chromium", BINARY, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(to_child, from_child), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_child)
        os.close(from_child)
        self.buffer = b""
        self.next = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
        except (OSError, TimeoutError, RuntimeError):
            self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.inp)
        os.close(self.out)
        shutil.rmtree(self.profile, ignore_errors=True)

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.inp], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self.inp, 1 << 20)
            if not data:
                raise OSError("Chromium ended")
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def call(self, method: str, session: str = "", timeout: float = 60, **params: Any) -> dict[str, Any]:
        """One DevTools command; events that arrive meanwhile are kept in `events`."""
        self.next += 1
        number = self.next
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        deadline = time.monotonic() + timeout
        while True:
            answer = self._read(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self.events.append(answer)

    def page(self) -> Page:
        """A new tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session)


class Page:
    """A tab: what it logged, what it asked the network for."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser = browser
        self.session = session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this tab."""
        return self.browser.call(method, self.session, **params)

    def resize(self, width: int, height: int = 900) -> None:
        """Set the viewport (CSS pixels)."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def theme(self, name: str, media: str = "") -> None:
        """The system's colour scheme: light or dark; `media` may be "print"."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.call("Emulation.setEmulatedMedia", media=media, features=[feature])

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def load(self, path: Path) -> None:
        """Open a file and wait until it has loaded and drawn every chart, from top to bottom."""
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 60
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            if time.monotonic() > deadline:
                raise TimeoutError("the page does not load")
            time.sleep(0.05)
        self.run(
            "(async () => { for (const p of document.querySelectorAll('.plot')) {"
            " p.scrollIntoView(); for (let i = 0; i < 100 && !p.querySelector('.main-svg'); i++)"
            " await new Promise(r => setTimeout(r, 50)); } window.scrollTo(0, 0); })()"
        )

    def logged(self) -> list[str]:
        """Errors, warnings and exceptions that the page has logged."""
        out = []
        self.run("1")
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            name, params = event["method"], event["params"]
            if name == "Runtime.exceptionThrown":
                out.append(str(params["exceptionDetails"]))
            elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                out.append(str(params["args"]))
            elif name == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                out.append(str(params["entry"]))
        return out

    def requests(self) -> list[str]:
        """Addresses that were asked for, other than the document itself and data: or blob: in it."""
        self.run("1")
        asked = [
            e["params"]["request"]["url"]
            for e in self.browser.events
            if e.get("sessionId") == self.session and e["method"] == "Network.requestWillBeSent"
        ]
        return [u for u in asked[1:] if not u.startswith(("data:", "blob:"))]

    def screenshot(self, path: Path, *, full: bool = True) -> None:
        """Write a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(shot["data"]))

    def overflow(self) -> list[str]:
        """Elements that reach beyond the viewport without standing in a box that scrolls."""
        found: list[str] = self.run(OVERFLOW)
        return found


OVERFLOW = """(() => {
  const width = document.documentElement.clientWidth, out = [];
  if (document.documentElement.scrollWidth > width) out.push('document');
  const scrolls = e => { for (; e && e !== document.body; e = e.parentElement) {
    const o = getComputedStyle(e).overflowX; if (o !== 'visible') return true; } return false; };
  for (const e of document.body.querySelectorAll('*')) {
    const r = e.getBoundingClientRect();
    if (r.width && r.right > width + 1 && !scrolls(e))
      out.push(e.tagName + '.' + e.className + ' ' + Math.round(r.right));
  }
  return out.slice(0, 10);
})()"""

"""A real Chromium without a window, driven by its DevTools protocol over a pipe (https://chromedevtools.github.io/devtools-protocol/).

with Browser(tmp_path) as browser:
    browser.open(page, width=360, scheme="dark")
    browser.run("document.title"); browser.requests; browser.complaints; browser.screenshot()
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_SECONDS = 60.0


class Browser:
    """requests: every URL that was asked for; complaints: what the console, the page's policy and its scripts said."""

    def __init__(self, folder: Path) -> None:
        """folder: for the profile."""
        assert CHROMIUM
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # With --remote-debugging-pipe Chromium reads from descriptor 3 and writes to 4.
        command = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     "--remote-debugging-pipe", f"--user-data-dir={folder}/profile"]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", CHROMIUM, *arguments],
            pass_fds=(theirs_in, theirs_out),
            stderr=open(folder / "chromium.log", "w"),
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._count, self._buffer, self._session = 0, b"", ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._loaded = False
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._call("Browser.close")
            self._process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired, AssertionError):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, page: Path, *, width: int, scheme: str = "light", height: int = 900) -> None:
        """A phone below 600 pixels."""
        self.requests, self.complaints, self._loaded = [], [], False
        phone = width < 600
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call("Page.navigate", url=page.resolve().as_uri())
        self._until(lambda: self._loaded)

    def run(self, script: str) -> Any:
        """The value of an expression."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point_at(self, x: float, y: float) -> None:
        """The mouse goes there."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """PNG of what is seen, or of the whole page."""
        return base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answers: list[dict[str, Any]] = []
        self._until(lambda: bool(answers), self._count, answers)
        assert "error" not in answers[0], answers[0]
        return answers[0]["result"]

    def _until(self, done: Callable[[], bool], number: int = 0, answers: list[dict[str, Any]] | None = None) -> None:
        limit = time.monotonic() + _SECONDS
        while not done():
            if not select.select([self._in], [], [], max(0.0, limit - time.monotonic()))[0]:
                raise AssertionError(f"Chromium has not answered within {_SECONDS:g} seconds")
            data = os.read(self._in, 1 << 20)
            assert data, "Chromium has ended"
            *messages, self._buffer = (self._buffer + data).split(b"\0")
            for message in map(json.loads, messages):
                if answers is not None and message.get("id") == number:
                    answers.append(message)
                elif "method" in message:
                    self._note(message["method"], message["params"])

    def _note(self, method: str, told: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{told['type']}: {told['args']}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {told['exceptionDetails']}")
        elif method == "Log.entryAdded":
            self.complaints.append(f"{told['entry']['level']}: {told['entry']['text']}")

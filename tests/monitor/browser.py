"""A headless Chromium to try pages in, driven through the DevTools protocol over its pipe; no package is needed.

with Browser(path_of_chromium, profile) as browser:
    browser.open(page)
    browser.click("#labels .leaf")
    browser.evaluate("document.title")
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEADLINE_S = 60.0


def find_browser() -> str | None:
    """The command of a Chromium that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of one Chromium. `problems`: what its console and its network said, as text."""

    def __init__(self, command: str, profile: Path) -> None:
        to_read, their_write = os.pipe()
        their_read, to_write = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
        flags += ' --remote-debugging-pipe --user-data-dir="$1"'
        # The protocol's descriptors are 3 and 4.
        script = f'exec "$0" {flags} about:blank 3<&{their_read} 4>&{their_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, command, str(profile)],
            pass_fds=(their_read, their_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_read)
        os.close(their_write)
        self.input = to_read
        self.output = to_write
        self.buffer = b""
        self.number = 0
        self.session: str | None = None
        self.problems: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.input)
        os.close(self.output)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol; RuntimeError with its error."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.output, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + DEADLINE_S
        while True:
            answer = self._receive(until)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._note(answer)

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.input], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self.input, 1 << 16) if ready else b""
            if not data:
                raise RuntimeError(f"the browser is silent (exit status {self.process.poll()})")
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        method = event.get("method", "")
        parameters = event.get("params", {})
        if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.problems.append(json.dumps(parameters)[:500])
        if method == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith(("file:", "about:")):
            self.problems.append(f"asked for {parameters['request']['url']}")
        if method == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {parameters.get('message')}")

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Of the window, in CSS pixels, and the colour scheme that it asks for."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, page: Path, fragment: str = "") -> None:
        """Load the page afresh and wait until it says that it is ready."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.as_uri() + fragment)
        self.wait("document.documentElement?.dataset.ready === 'true'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; RuntimeError when it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true; RuntimeError after the deadline."""
        until = time.monotonic() + DEADLINE_S
        while not self.evaluate(expression):
            if time.monotonic() > until:
                raise RuntimeError(f"never true: {expression}; {self.problems}")
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of the first such element."""
        spot = self.evaluate(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=spot[0], y=spot[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """One key, by its name in the DOM; a character is typed."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path: Path) -> None:
        """What the window shows, as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

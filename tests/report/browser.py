"""Headless Chromium over its debugging pipe: pages with computed styles, and nothing to install.

The protocol's messages go over file descriptors 3 and 4, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
WAIT = 120.0
"""Seconds for one answer; a loaded machine is slow, a hung browser is not waited for."""
WEBGPU = ("--enable-unsafe-webgpu", "--disable-gpu-watchdog")
"""Options with which it has WebGPU on the CPU (SwiftShader), on a machine without a GPU.

The watchdog ends a process that computes for long, as this one does on a loaded machine.
"""


KEYS = {
    "Tab": (9, ""), "Enter": (13, "\r"), "Space": (32, " "), "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""), "ArrowRight": (39, ""), "ArrowDown": (40, ""),
}  # fmt: skip
"""The keys that a test presses, with their codes in Windows and the text that they type."""


class Browser:
    """One tab. `requests` lists the addresses that it asked for, `errors` what its console said.

    Args:
        profile: An empty folder.
        options: Further ones of the program.
    """

    def __init__(self, profile: Path, options: Sequence[str] = ()) -> None:
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        shell = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'
        own = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, str(read), str(write), str(PROGRAM), *own, *options,
             "--hide-scrollbars", f"--user-data-dir={profile}", "--no-first-run", "about:blank"],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self._ids, self._rest = itertools.count(1), b""
        self._session = ""
        self._events: list[dict[str, Any]] = []
        tabs = self._call("Target.getTargets")["targetInfos"]
        tab = next(t["targetId"] for t in tabs if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=tab, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def open(
        self, page: Path | str, *, width: int = 1280, dark: bool = False, script: bool = True
    ) -> None:
        """Show a file or an address at a width, in a theme, with its JavaScript or without."""
        self._call("Emulation.setScriptExecutionDisabled", value=not script)
        self.look(width=width, dark=dark)
        self._events.clear()
        address = page if isinstance(page, str) else page.resolve().as_uri()
        self._call("Page.navigate", url=address)
        deadline = time.monotonic() + WAIT
        while not any(e["method"] == "Page.loadEventFired" for e in self._events):
            assert time.monotonic() < deadline, f"{page} is not loaded"
            self._events.append(self._message())

    def look(self, *, width: int = 1280, dark: bool = False) -> None:
        """Show what is open at another width, in another theme."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", media="screen", features=[theme])

    def drag(self, points: Sequence[tuple[float, float]]) -> None:
        """Press the mouse at the first of the points of the window, move through all, let go."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True):
            self._call(
                "Input.dispatchMouseEvent",
                type=kind, x=x, y=y, button="left", buttons=1, clickCount=1,
            )  # fmt: skip

    def press(self, *keys: str) -> None:
        """Press and let go of keys, one after another, by their names in KEYS."""
        for key in keys:
            code, text = KEYS[key]
            params = {"key": text or key, "code": key, "windowsVirtualKeyCode": code}
            down = "keyDown" if text else "rawKeyDown"
            self._call("Input.dispatchKeyEvent", type=down, text=text, **params)
            self._call("Input.dispatchKeyEvent", type="keyUp", **params)

    def download_to(self, folder: Path) -> None:
        """Let the page's downloads lie in a folder."""
        self._call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for since open."""
        sent = (e for e in self._events if e["method"] == "Network.requestWillBeSent")
        return [e["params"]["request"]["url"] for e in sent]

    @property
    def errors(self) -> list[str]:
        """What the console said and what was thrown since open."""
        bad = ("Log.entryAdded", "Runtime.exceptionThrown")
        return [json.dumps(e["params"]) for e in self._events if e["method"] in bad]

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, or its promise, as JSON; the tool's own scripts run."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as a .png."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError, AssertionError):
            self._session = ""
            self._call("Browser.close")
        os.close(self._write)
        os.close(self._read)
        self._process.wait(WAIT)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self._events.append(answer)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], WAIT)
            assert ready, "the browser does not answer"
            more = os.read(self._read, 1 << 20)
            assert more, "the browser ended"
            self._rest += more
        one, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(one)
        return answer


@contextlib.contextmanager
def browser(profile: Path, options: Sequence[str] = ()) -> Iterator[Browser]:
    """A browser that ends with the block."""
    one = Browser(profile, options)
    try:
        yield one
    finally:
        one.close()

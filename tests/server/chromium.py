# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for tests, driven over a pipe with its own protocol (DevTools); nothing to install beside it."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Chromium", "find_chromium"]

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--disable-dev-shm-usage",
)  # fmt: skip


def find_chromium() -> str:
    """Its path; without it the test is skipped, or fails where CI runs."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail("chromium is missing; CI must install it (apt-get install chromium)")
        pytest.skip("chromium is not installed (apt-get install chromium)")
    return found


class Chromium:
    """One page. A context manager: leaving it ends the browser."""

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self.faults: list[str] = []
        """What the console said as warning or error, broken policies and exceptions included."""
        self._number, self._session, self._rest = 0, "", b""

    def __enter__(self) -> "Chromium":
        read_commands, self._write = os.pipe()
        self._read, write_answers = os.pipe()
        # The protocol speaks on descriptors 3 and 4 of the browser.
        script = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
        command = [
            find_chromium(),
            *FLAGS,
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", *command],
            pass_fds=(read_commands, write_answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Page.bringToFront")  # a page in the background paints nothing
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        self._call("Browser.close")
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)

    def open(self, url: str) -> None:
        """Load a page, to its end."""
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def wait(self, condition: str, seconds: float = 20.0) -> float:
        """Until a JavaScript expression holds; returns the seconds that it took."""
        began = time.monotonic()
        while not self.value(condition):
            assert time.monotonic() - began < seconds, f"{condition} does not hold; console: {self.faults}"
            time.sleep(0.05)
        return time.monotonic() - began

    def value(self, expression: str) -> Any:
        """A JavaScript value; None while one page takes another's place."""
        found = self._call("Runtime.evaluate", moves=True, expression=expression, returnByValue=True)
        return found.get("result", {}).get("value")

    def click(self, selector: str) -> None:
        """Press and release the mouse where a person would: in the middle of what is seen of an element."""
        middle = f"""(() => {{
            if (document.readyState !== "complete") return null;  // without its styles it lies elsewhere
            const element = document.querySelector({json.dumps(selector)});
            element?.scrollIntoView({{block: "center", behavior: "instant"}});
            const box = element?.getBoundingClientRect();
            if (!box || !box.width) return null;
            const at = [box.x + box.width / 2, box.y + box.height / 2], top = document.elementFromPoint(...at);
            return element.contains(top) || top?.contains(element) ? at : null;
        }})()"""
        self.wait(f"{middle} !== null")
        x, y = self.value(middle)
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", moves=True, type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Click into a field and write ``text``, in place of what is there."""
        self.click(selector)
        self.value("document.activeElement.select()")
        self._call("Input.insertText", text=text)

    def save_downloads(self, folder: Path) -> None:
        """Where files go that a page lets a person save."""
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def press(self, key: str, code: int, text: str = "") -> None:
        """One key of the keyboard, by its name and its virtual-key code."""
        values: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **values)
        self._call("Input.dispatchKeyEvent", type="keyUp", **values)

    def screen(self, width: int, height: int, *, mobile: bool = False, dark: bool = False) -> None:
        """Be a screen of this size (CSS pixels)."""
        scale = 2 if mobile else 1
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def shoot(self, path: Path) -> None:
        """Save the whole page as PNG, as wide as the screen."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 6000), "scale": 1}
        taken = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def _call(self, method: str, *, moves: bool = False, **parameters: Any) -> dict[str, Any]:
        """One command; ``moves``: the page may change under it, and then its answer is empty."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session and not method.startswith("Browser."):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert moves or "error" not in answer, f"{method}: {answer['error']}"
                if "error" in answer:
                    return {}
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], 60)
            assert ready, "the browser does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser ended"
            self._rest += part
        line, self._rest = self._rest.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        values = event.get("params", {})
        if event["method"] == "Log.entryAdded" and values["entry"]["level"] in ("warning", "error"):
            self.faults.append(f"{values['entry']['text']} {values['entry'].get('url', '')}")
        elif event["method"] == "Runtime.exceptionThrown":
            self.faults.append(str(values["exceptionDetails"]))
        elif event["method"] == "Runtime.consoleAPICalled" and values["type"] in ("warning", "error", "assert"):
            self.faults.append(str(values["args"]))

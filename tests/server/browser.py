# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for tests, driven by Playwright: what a person sees, types, clicks, and reaches by keyboard.

Debian's Chromium, so that nothing is downloaded. :class:`Browser` is one window and keeps what went wrong in it: what
the console said, and requests that would leave this machine. :meth:`Browser.inspect` looks at a page as somebody does
who checks whether everybody can use it: by axe-core's rules (WCAG 2.2 AA) in light and dark, by keyboard alone, on
a phone.
"""

import shutil
import time
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from tests.needs import lacking, need_package

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Locator, Page, Request

__all__ = ["DESK", "PHONE", "Browser", "find_chromium"]

DESK, PHONE = (1280, 800), (390, 844)
"""Screens: width and height in CSS pixels."""
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
MOST_STOPS = 300
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
_CAN_FOCUS = """() => [...document.querySelectorAll(
    'a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex]:not([tabindex="-1"])')]
    .filter(e => e.checkVisibility() && !e.disabled && (e.type !== 'radio' || e.checked))"""
_NAME = "e => [e.localName, e.id, e.getAttribute('href') || '', (e.innerText || '').trim().slice(0, 30)].join(' ')"
_TO_THE_START = """() => {
    const start = document.createElement('span');
    start.tabIndex = -1;
    document.body.prepend(start);
    start.focus();
    start.remove();
    scrollTo(0, 0);
}"""
"""The next Tab goes to the first element of the page."""
_STOP = f"""() => {{
    const e = document.activeElement;
    if (!e || e === document.body) return null;
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    return {{
        name: ({_NAME})(e),
        marked: e.matches(':focus-visible') && style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2,
        seen: box.width > 1 && box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
    }};
}}"""


def find_chromium() -> str:
    """Its path; without it or Playwright the test is skipped, or fails where CI runs."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        lacking("chromium is not installed (apt-get install chromium)")
    for package in ("playwright", "axe_playwright_python"):
        need_package(package, "dev")
    return found


class Browser:
    """One window. A context manager: leaving it ends the browser.

    Args:
        phone: a phone with a touch screen, not a desk.
        downloads: where files go that a page lets a person save.
    """

    def __init__(self, *, phone: bool = False, downloads: Path | None = None) -> None:
        self._phone, self._downloads = phone, downloads
        self.faults: list[str] = []
        """Warnings and errors of the console, exceptions, and requests to other machines."""
        self.requests: list[str] = []
        """Every address that a page asked for."""

    def __enter__(self) -> "Browser":
        from playwright.sync_api import sync_playwright

        chromium = find_chromium()
        self._playwright = sync_playwright().start()
        try:
            self._browser = self._playwright.chromium.launch(executable_path=chromium, args=["--disable-quic"])
            width, height = PHONE if self._phone else DESK
            context = self._browser.new_context(
                viewport={"width": width, "height": height}, is_mobile=self._phone, has_touch=self._phone,
                device_scale_factor=2 if self._phone else 1, color_scheme="light",
            )  # fmt: skip
            self.page: Page = context.new_page()
        except BaseException:
            self._playwright.stop()
            raise
        self.page.set_default_timeout(20_000)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        self.page.on("request", self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.close()
        self._playwright.stop()

    # -- what a person does ----------------------------------------------------------------------------

    def open(self, url: str) -> None:
        """Load a page, to its end."""
        self.page.goto(url)

    def find(self, selector: str) -> "Locator":
        """An element, by a CSS selector."""
        return self.page.locator(selector)

    def click(self, selector: str) -> None:
        """Press the mouse where the element is seen."""
        self.page.click(selector)

    def type(self, selector: str, text: str) -> None:
        """Write ``text`` into a field, in place of what is there."""
        self.page.fill(selector, text)

    def press(self, key: str) -> None:
        """One key of the keyboard."""
        self.page.keyboard.press(key)

    def save(self, selector: str) -> Path:
        """Click a link that saves a file; returns where it lies."""
        assert self._downloads is not None
        with self.page.expect_download() as waiting:
            self.click(selector)
        path = self._downloads / waiting.value.suggested_filename
        waiting.value.save_as(path)
        return path

    # -- what a person sees ----------------------------------------------------------------------------

    def value(self, expression: str) -> Any:
        """A JavaScript value."""
        return self.page.evaluate(expression)

    def wait(self, condition: str, seconds: float = 20.0) -> float:
        """Until a JavaScript expression holds, also over changes of the page; returns the seconds that it took."""
        from playwright.sync_api import TimeoutError as TooLong

        began = time.monotonic()
        try:
            # As a function: the policy of our pages lets no text be evaluated later.
            self.page.wait_for_function(f"() => {condition}", timeout=1000 * seconds, polling=50)
        except TooLong as error:
            raise AssertionError(f"{condition} does not hold; console: {self.faults}") from error
        return time.monotonic() - began

    def first_paint(self, limit: float = 1.0) -> float:
        """Seconds from the request to the first content of this page, at most ``limit``.

        Where it took longer, other programs may have had the processors: then it is loaded again, and what this test's
        processes computed for it, browser and server alike, is within the limit.
        """
        self.wait(f"({FIRST_PAINT}) !== null")
        seen = float(self.value(FIRST_PAINT)) / 1000
        if seen > limit:
            before = self.cpu_seconds()
            self.page.reload()
            self.wait(f"({FIRST_PAINT}) !== null")
            again, busy = float(self.value(FIRST_PAINT)) / 1000, self.cpu_seconds() - before
            assert min(again, busy) <= limit, f"{self.page.url}: content after {seen} s, {again} s ({busy} s computed)"
        return seen

    def screen(self, size: tuple[int, int], *, dark: bool = False) -> None:
        """Be a window of this size (CSS pixels)."""
        self.page.set_viewport_size({"width": size[0], "height": size[1]})
        self.page.emulate_media(color_scheme="dark" if dark else "light")

    def shoot(self, path: Path, *, whole: bool = True) -> None:
        """Save what is seen as PNG: the whole page, or its first screen."""
        self.page.screenshot(path=path, full_page=whole)

    def is_too_wide(self, width: int) -> bool:
        """Whether a page must be moved sideways to be read."""
        return int(self.value("document.documentElement.scrollWidth")) > width

    def cpu_seconds(self) -> float:
        """Processor time so far of all processes that this one started."""
        times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        return float(sum(one.user + one.system for one in times))

    # -- whether everybody can use it ------------------------------------------------------------------

    def inspect(self, what: str) -> None:
        """Everybody can use the page: no rule of axe-core is broken, keys reach everything, a phone holds it."""
        scheme = str(self.value("matchMedia('(prefers-color-scheme: dark)').matches"))
        for dark in (False, True):
            self.page.emulate_media(color_scheme="dark" if dark else "light")
            broken = self._axe()
            assert not broken, f"{what}, {'dark' if dark else 'light'}: {broken}"
        self.page.emulate_media(color_scheme="dark" if scheme == "true" else "light")
        self.tab_through(what)
        size = self.page.viewport_size
        assert size is not None
        self.screen(PHONE)
        assert not self.is_too_wide(PHONE[0]), f"{what} is wider than a phone"
        self.screen((size["width"], size["height"]))

    def tab_through(self, what: str) -> list[str]:
        """Tab from the page's start to its end; returns where it stops.

        Every element that can be used is reached, in the order of the page, is seen, and is marked as focused.
        """
        self.page.evaluate(_TO_THE_START)
        wanted = self.page.evaluate(f"() => ({_CAN_FOCUS})().map({_NAME})")
        stops: list[str] = []
        while len(stops) < MOST_STOPS:
            self.page.keyboard.press("Tab")
            stop = self.page.evaluate(_STOP)
            if stop is None or (stops and stop["name"] == stops[0] and len(stops) >= len(wanted)):
                break
            assert stop["seen"], f"{what}: {stop['name']} has the focus and is not seen"
            assert stop["marked"], f"{what}: nothing shows that {stop['name']} has the focus"
            stops.append(stop["name"])
        reached = [name for name in stops if name in wanted]
        assert reached == wanted, f"{what}: keys reach {reached}, not {wanted}"
        return stops

    def tab_to(self, selector: str) -> None:
        """Tab on from where the focus is until an element has it."""
        for _ in range(MOST_STOPS):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"keys do not reach {selector}")

    def _axe(self) -> list[str]:
        """Rules that the page breaks, each with its first element."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page, options={"runOnly": {"type": "tag", "values": TAGS}})
        return [
            f"{rule['id']} ({rule['help']}), {len(rule['nodes'])} times: {rule['nodes'][0]['html'][:200]} "
            f"{rule['nodes'][0]['any'][:1]}"
            for rule in found.response["violations"]
        ]

    # -- what goes wrong -------------------------------------------------------------------------------

    def _said(self, message: "ConsoleMessage") -> None:
        if message.type in ("warning", "error", "assert"):
            self.faults.append(f"{message.text} {message.location.get('url', '')}")

    def _asked(self, request: "Request") -> None:
        self.requests.append(request.url)
        if not _stays_here(request.url):
            self.faults.append(f"a request leaves this machine: {request.url}")


def _stays_here(url: str) -> bool:
    """Whether an address is on this machine."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "ws", "wss"):
        return True  # file:, data:, blob:, about:
    host = parts.hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

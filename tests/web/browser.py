"""A real headless Chromium, driven over ChromeDriver's own HTTP protocol (W3C WebDriver); no package needed."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DRIVER_TRIES = 20
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in a container
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def require_browser() -> tuple[str, str]:
    """Paths of Chromium (or Chrome) and ChromeDriver; skips the test where they are missing."""
    chromium, driver = _program("chromium", "google-chrome"), _program("chromedriver")
    if not (chromium and driver):
        pytest.skip(
            "no Chromium: tools/install_test_packages.sh installs Debian's chromium and chromium-driver; on Ubuntu, "
            "where they are a snap, install google-chrome and the chromedriver of its version"
        )
    return chromium, driver


def _program(*names: str) -> str | None:
    """The first that is there, and no snap: that has a /tmp of its own, so that it finds no profile of a test."""
    found = [path for name in names if (path := shutil.which(name))]
    return next((path for path in found if not _is_snap(Path(path))), None)


def _is_snap(program: Path) -> bool:
    with program.open("rb") as file:  # Ubuntu's packages are scripts that start the snap, or say how to get it
        return program.is_relative_to("/snap") or b"/snap/bin/" in file.read(4096)


class Browser:
    """One window; `close` ends browser and driver."""

    def __init__(self, profile: Path) -> None:
        chromium, driver = require_browser()
        self._base = ""
        for _ in range(DRIVER_TRIES):
            self._driver = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
            try:
                if self._is_driver_up():
                    self._start_session(chromium, profile)
                    return
            except BaseException:
                self._end_driver()
                raise
            self._end_driver()
        raise AssertionError(f"ChromeDriver found no port in {DRIVER_TRIES} tries")

    def _is_driver_up(self) -> bool:
        """It takes a free port of IPv4 and wants the same of IPv6; where that is taken, it ends."""
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if "started successfully on port" in line:
                self._base = f"http://127.0.0.1:{line.strip().rstrip('.').rsplit(' ', 1)[1]}"
                return True
        return False

    def _start_session(self, chromium: str, profile: Path) -> None:
        options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        capabilities = {
            "alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}},
        }
        session = self._call("POST", "/session", {"capabilities": capabilities})["sessionId"]
        self._base += f"/session/{session}"

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)  # noqa: S310 - this machine
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - this machine
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()}") from None

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """The value that the script returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str = "body") -> str:
        """The text of the first such element, as it is shown; empty where there is none yet."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def size(self, width: int, height: int, *, mobile: bool = False, dark: bool = False) -> None:
        """The page's own size and colour scheme, as a phone has them with `mobile`."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},  # bars are where they belong, at once
        ]
        self._devtools("Emulation.setEmulatedMedia", {"features": features})

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        image = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(image["data"]))

    def console(self) -> list[str]:
        """What the page wrote to the console, refusals of the content security policy among it."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def wait_until(self, met: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s; the page says:\n{self.text()}"
            time.sleep(0.05)

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._end_driver()

    def _end_driver(self) -> None:
        self._driver.terminate()
        self._driver.wait(120)
        assert self._driver.stdout is not None
        self._driver.stdout.close()

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

"""Headless Chromium for tests: its executable, and a page controlled through the DevTools protocol."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from deadlines import seconds, until

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
KEYS = {"ArrowDown": 40, "ArrowUp": 38, "ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35}


def chromium() -> str:
    """Return the browser's executable.

    If there is none, the test is skipped; if ``CI`` is set, the browser is installed, or the test fails.
    """
    if found := _on_path():
        return found
    if not os.environ.get("CI"):
        pytest.skip("no chromium or chrome on the path: apt-get install chromium (done where CI is set)")
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        pytest.fail("no chromium, and it can be installed only as root and by apt-get")
    with (Path(tempfile.gettempdir()) / "gear_lightning_apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not _on_path():
            quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True, "text": True}
            subprocess.run(["apt-get", "update"], timeout=seconds(300), check=False, **quiet)
            command = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
            done = subprocess.run(command, timeout=seconds(600), check=False, **quiet)
            if done.returncode:
                pytest.fail(f"apt-get install chromium failed: {done.stderr.strip()[-300:]}")
    found = _on_path()
    assert found
    return found


def _on_path() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def dump(file: Path, profile: Path, milliseconds: int = 3000) -> str:
    """Return the document of a file after its scripts have run."""
    flags = [*FLAGS, f"--virtual-time-budget={milliseconds}", "--dump-dom", f"--user-data-dir={profile}"]
    command = [chromium(), *flags, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds(120), check=True).stdout


class Page:
    """One page in its own browser, controlled over a pair of pipes.

    Attributes:
        errors: console errors and uncaught exceptions, in order.
    """

    def __init__(self, profile: Path, width: int = 1500, height: int = 950):
        ours, theirs = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (theirs[0], ours[1])]

        def place() -> None:  # DevTools' pipes are file descriptors 3 (commands) and 4 (answers)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [chromium(), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, preexec_fn=place, close_fds=False, **quiet)
        for fd in (*ends, theirs[0], ours[1]):
            os.close(fd)
        self._read, self._write = ours[0], theirs[1]
        self._buffer, self._number, self._session = b"", 0, None
        self._events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.size(width, height)

    def close(self) -> None:
        """Close the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], seconds(60))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise ConnectionError("the browser has gone")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        method, about = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self.errors.append(str(about["args"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(about["entry"]["text"])
        return message

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol, and return the response."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while (answer := self._message()).get("id") != self._number:
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, url: str) -> None:
        """Open an address of a credit page and wait until it is shown."""
        self.send("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank' && document.readyState === 'complete'")
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && !!document.documentElement.dataset.ready")

    def js(self, expression: str) -> Any:
        """Return the value of an expression in the page; promises are awaited."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", "thrown"))
        return done["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        until(lambda: self.js(expression), expression, pause=0.01)

    def size(self, width: int, height: int = 950) -> None:
        """Set the inner size of the window, in pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """Set the preferred color scheme, ``light`` or ``dark``."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def click(self, selector: str, number: int = 0) -> None:
        """Click in the middle of an element with the mouse."""
        x, y = self.js(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{number}]; "
            "e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect(); "
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, key: str) -> None:
        """Press and release a key."""
        about: dict[str, Any] = {"key": key}
        if len(key) == 1:
            about["text"] = key
        else:
            about |= {"code": key, "windowsVirtualKeyCode": KEYS[key]}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, **about)

    def type(self, selector: str, text: str) -> None:
        """Replace the content of a text field."""
        self.js(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.focus(); e.select(); }})()")
        self.send("Input.insertText", text=text) if text else self.choose(selector, "")

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select element, with the events of a user's choice."""
        self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)}; "
            "for (const n of ['input', 'change']) e.dispatchEvent(new Event(n, {bubbles: true})); })()"
        )

    def text(self, selector: str) -> str:
        """Return the text of the first element."""
        return self.js(f"document.querySelector({json.dumps(selector)}).textContent")

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")

    def screenshot(self, file: Path) -> None:
        """Write a screenshot as PNG."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

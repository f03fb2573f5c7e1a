"""A real browser without a window, over Chromium's DevTools protocol on a pipe: nothing to install for it."""

import json
import os
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Left(Exception):
    """The page is being left for another one."""


class Browser:
    """One tab. `console` holds every error and warning that a page has caused, uncaught exceptions included."""

    def __init__(self, profile):
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"', "bash", CHROMIUM, *flags,
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._read, self._session, self._allowed = 0, b"", None, ("about:",)
        self.console = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, page, width=1280, height=900):
        """A file, or an address of a server, which may be asked for more; nobody else may."""
        url = page if isinstance(page, str) else page.resolve().as_uri()
        self._allowed = ("file:", "data:", "blob:", "about:", *([page] if isinstance(page, str) else []))
        self.console.clear()
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && document.getElementById('title')?.textContent")

    def leave(self):
        """What the page goes on to do is of no interest any more."""
        self._call("Page.navigate", url="about:blank")
        self.until("document.readyState === 'complete'")
        self.console.clear()

    def prefer(self, scheme):
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, expression):
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, selector):
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    def click(self, selector):
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def choose(self, selector, value):
        """Type into a field, or take an option."""
        self.evaluate(
            f"(e => {{ e.value = {json.dumps(value)}; for (const kind of ['input', 'change'])"
            f" e.dispatchEvent(new Event(kind, {{bubbles: true}})) }})(document.querySelector({json.dumps(selector)}))"
        )

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")

    def until(self, expression, seconds=20):
        end = time.monotonic() + seconds
        while not self._holds(expression):
            assert time.monotonic() < end, f"never came true: {expression}"
            time.sleep(0.05)

    def _holds(self, expression):
        try:
            return self.evaluate(expression)
        except Left:
            return False

    def close(self):
        os.close(self._to)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self._note(answer)
        if "context" in answer.get("error", {}).get("message", ""):
            raise Left
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _receive(self):
        while b"\0" not in self._read:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        kind, parameters = event["method"], event["params"]
        if kind == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description", details["text"]))
        elif kind == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.console.append(parameters["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.console.append(" ".join(str(argument.get("value")) for argument in parameters["args"]))
        elif kind == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith(self._allowed):
                self.console.append(f"asked the network for {url}")

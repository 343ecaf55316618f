"""Headless Chromium, driven over its DevTools protocol with the standard library alone."""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)
TIMEOUT = 60.0


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Tab:
    """One tab. A command is sent, and what arrives until its answer is kept in ``events``."""

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname and parts.port
        self.events: list[dict[str, Any]] = []
        self.count = 0
        self.socket = socket.create_connection((parts.hostname, parts.port), TIMEOUT)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.stream = self.socket.makefile("rb")
        assert b" 101 " in self.stream.readline()
        while self.stream.readline() != b"\r\n":
            pass

    def close(self) -> None:
        self.stream.close()
        self.socket.close()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        payload = json.dumps({"id": self.count, "method": method, "params": params}).encode()
        # one final text frame, masked as a client's has to be (RFC 6455, section 5.2)
        length = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + struct.pack(">H", len(payload))
        self.socket.sendall(b"\x81" + length + bytes(4) + payload)
        while True:
            message = self.receive()
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def receive(self) -> dict[str, Any]:
        content, final = b"", False
        while not final:
            head, size = self.stream.read(2)
            final = bool(head & 0x80)
            if size == 126:
                (size,) = struct.unpack(">H", self.stream.read(2))
            elif size == 127:
                (size,) = struct.unpack(">Q", self.stream.read(8))
            content += self.stream.read(size)
        return json.loads(content)

    def open(self, url: str) -> None:
        """Loads a page and waits for its load event."""
        self.send("Page.enable")
        self.send("Log.enable")
        self.send("Network.enable")
        self.send("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression: str) -> Any:
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")  # none of an undefined one


@contextmanager
def browser_tab(executable: str, profile: Path) -> Iterator[Tab]:
    """A tab of a browser of its own, which ends with the block."""
    command = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        tab = Tab(tab_url(process, profile))
        try:
            yield tab
        finally:
            tab.close()
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def tab_url(process: "subprocess.Popen[bytes]", profile: Path) -> str:
    """The DevTools address of the first tab, once the browser listens."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        try:
            port = (profile / "DevToolsActivePort").read_text().split()[0]
            with direct.open(f"http://127.0.0.1:{port}/json/list", timeout=TIMEOUT) as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        except (OSError, IndexError):
            pass  # not listening yet
        time.sleep(0.1)
    raise TimeoutError("the browser did not open its DevTools port")

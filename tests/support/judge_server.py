"""An HTTP server that judges, and fails, by what the caption asks it to.

Run as a program, this file is that server: it prints its port, and serves until its parent closes it.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.request import urlopen

import pytest

KEY = "sk-not-for-anybodys-eyes"

FAST = {"timeout": 5.0, "backoff": 0.01}


class Handler(BaseHTTPRequestHandler):
    """One small model, `judge`; GET /log tells what it was asked."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    asked: ClassVar[Counter[str]] = Counter()
    log: ClassVar[list[dict[str, Any]]] = []
    busy = 0
    most_busy = 0

    def do_GET(self) -> None:
        if self.path == "/log":
            return self.answer(200, {"requests": Handler.log, "most_busy": Handler.most_busy})
        if not self.admitted():
            return None
        return self.answer(200, {"data": [{"id": "judge"}, {"id": "other"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture, question = body["messages"][0]["content"]
        caption = re.findall(r"\[(.*)\]", question["text"])[-1]
        with Handler.lock:
            Handler.asked[caption] += 1
            entry = {"caption": caption, "at": time.time(), "path": self.path, "model": body["model"]}
            Handler.log.append(entry | {"picture": picture["image_url"]["url"], "text": question["text"]})
        if self.admitted():
            self.reply(caption, Handler.asked[caption])

    def admitted(self) -> bool:
        given, wanted = self.headers.get("Authorization"), os.environ.get("SERVER_KEY")
        if wanted and given != f"Bearer {wanted}":
            self.answer(401, {"error": f"Incorrect API key: {given}"}, reason=f"no {given}")
            return False
        return True

    def be_busy(self, seconds: float) -> None:
        """Ends before the answer goes out: who has it may ask the next thing at once."""
        with Handler.lock:
            Handler.busy += 1
            Handler.most_busy = max(Handler.most_busy, Handler.busy)
        time.sleep(seconds)
        with Handler.lock:
            Handler.busy -= 1

    def reply(self, caption: str, times: int) -> None:
        what, _, rest = caption.partition(" ")
        if what == "slow":
            self.be_busy(0.4)
        if what == "hang" or (caption == "once hang" and times == 1):
            time.sleep(3)
        if what == "drop" or (caption == "once drop" and times == 1):
            self.close_connection = True
        elif what == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif what == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "40")
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b" ")
                time.sleep(0.05)
        elif what == "garbage":
            self.wfile.write(f"{self.headers['Authorization']} is not HTTP\r\n\r\n".encode())
            self.close_connection = True
        elif what in ("429", "500", "400") and (rest != "once" or times == 1):
            wait = {"seconds": "1", "date": formatdate(time.time() + 2, usegmt=True)}.get(rest)
            if wait is None or times == 1:
                auth = self.headers["Authorization"]
                return self.answer(int(what), {"error": auth}, reason=str(auth), retry_after=wait)
            self.chat("Final Score: 3")
        elif what == "prose":
            self.chat("A lovely picture, worth five stars.")
        elif what == "cut":
            self.chat("Final Score: 4", finish="length")
        elif what == "thought":
            self.answer(200, {"choices": [{"message": {"content": None, "reasoning_content": f"so {KEY} is {rest}"}}]})
        elif what == "tokens":
            self.chat(f"Well:\r\nFinal Score: {rest}<|im_end|></s>\r\n")
        elif what == "empty":
            self.answer(200, {"choices": []})
        elif what == "score":
            self.chat(f"The image shows it well.\nFinal Score: {rest}")
        else:
            self.chat("Final Score: 3")
        return None

    def chat(self, text: str, finish: str = "stop") -> None:
        self.answer(200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]})

    def answer(self, status: int, content: Any, reason: str | None = None, retry_after: str | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status, reason)
        self.send_header("Content-Length", str(len(data)))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


def serve(handler: type[BaseHTTPRequestHandler] = Handler) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()  # ends with the parent


@contextmanager
def chat_server(key: str = "", module: str = __name__) -> Iterator[str]:
    """URL of a server process; with `key`, one that wants it."""
    command, environment = [sys.executable, "-m", module], os.environ | {"SERVER_KEY": key}
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment, text=True, cwd=root) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with chat_server() as address:
        yield address


def requests(url: str, caption: str) -> list[dict[str, Any]]:
    with urlopen(f"{url}/log") as answer:
        found: list[dict[str, Any]] = json.load(answer)["requests"]
    return [request for request in found if request["caption"] == caption]


if __name__ == "__main__":
    serve()

"""UnifiedReward against a real HTTP server process that answers, and fails, by what the caption asks it to.

Run as a program, this file is that server: it prints its port, and serves until its parent closes it.
"""

import base64
import json
import logging
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
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar
from urllib.request import urlopen

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

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
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment, text=True, cwd=root) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with chat_server() as address:
        yield address


@pytest.fixture(scope="module")
def guarded_url() -> Iterator[str]:
    with chat_server(KEY) as address:
        yield address


def build(url: str | list[str], **options: Any) -> Any:
    from g2rpo_ray.rewards import build_reward

    return build_reward("unified_reward", base_urls=url, **FAST | options)


def pictures(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)


def requests(url: str, caption: str) -> list[dict[str, Any]]:
    with urlopen(f"{url}/log") as answer:
        found: list[dict[str, Any]] = json.load(answer)["requests"]
    return [request for request in found if request["caption"] == caption]


def test_each_picture_gets_the_number_after_the_label(url: str) -> None:
    scores = build(url).score(pictures(4), ["score 4.5", "score 1", "score 2.25", "score 5"])
    assert scores.dtype == np.float32
    assert scores.tolist() == [4.5, 1, 2.25, 5]


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_request_holds_the_picture_the_caption_and_the_first_model(url: str, image_format: str) -> None:
    images = pictures(1)
    build(url, image_format=image_format).score(images, [f"a {{cat}} as {image_format}"])
    (request,) = requests(url, f"a {{cat}} as {image_format}")
    assert request["path"] == "/v1/chat/completions"
    assert request["model"] == "judge"
    assert request["text"].endswith(
        f"after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [a {{cat}} as {image_format}]"
    )
    head, data = request["picture"].split(",")
    assert head == f"data:image/{image_format};base64"
    with Image.open(BytesIO(base64.b64decode(data))) as picture:
        assert picture.format == image_format.upper()
        assert picture.size == (8, 6)
        if image_format == "png":
            np.testing.assert_array_equal(np.array(picture), images[0])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Final Score: 4", 4),
        ("Alignment: 3\nQuality: 5\n**Final Score:** 3.5", 3.5),
        ("**Final Score: 2.75**\n", 2.75),
        ("Final Score:\n 4.", 4),
        ("After 'Final Score:' comes\nFinal Score: 3", 3),
        ("Final Score: 3\nso Final Score: 3.0", 3),
        ("Final Score: 3\nno: Final Score: 4", None),
        ("Final Score: 4/5", None),
        ("Final Score: 8 out of 10", None),
        ("Final Score: 0.5", None),
        ("Final Score: 5.5", None),
        ("Final Score: -3", None),
        ("Final Score: 1e0", None),
        ("Final Score: four", None),
        ("Final Score: nan", None),
        ("Score: 4", None),
        ("4", None),
        ("", None),
    ],
)
def test_final_score_is_parsed_strictly(answer: str, expected: float | None) -> None:
    from g2rpo_ray.rewards.judge import Unparsed
    from g2rpo_ray.rewards.unified_reward import read_grade

    if expected is not None:
        assert read_grade(answer) == expected
        return
    with pytest.raises(Unparsed, match="no single 'Final Score: 1…5' in the answer"):
        read_grade(answer)


@pytest.mark.parametrize(
    ("caption", "reason", "attempts"),
    [
        ("prose", "no single 'Final Score: 1…5' in the answer", 1),
        ("cut", "cut off", 1),
        ("empty", "without choices", 1),
        ("score 7", "no single", 1),
        ("400", "HTTP 400 Bad Request", 1),
        ("500 always", "HTTP 500 Internal Server Error", 3),
        ("drop", "RemoteProtocolError, the connection broke", 3),
        ("half", "RemoteProtocolError, the connection broke", 3),
        ("garbage", "RemoteProtocolError, the connection broke", 3),
        ("hang", "ReadTimeout: timed out", 3),
        ("drip", "ReadTimeout: the answer did not end", 3),
    ],
)
def test_what_fails_is_missing_and_leaves_the_others_alone(
    caption: str, reason: str, attempts: int, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    reward = build(url, retries=2, timeout=0.8 if caption in ("hang", "drip") else 5)
    scores = reward.score(pictures(3), ["score 2", caption, "score 4"])
    assert scores[[0, 2]].tolist() == [2, 4]
    assert np.isnan(scores[1])
    assert len(requests(url, caption)) == attempts
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"unified_reward: no score for {caption!r}: ")
    assert reason in line
    assert "\n" not in line
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("caption", ["500 once", "once drop", "once hang", "429 once"])
def test_what_fails_once_is_asked_again(caption: str, url: str) -> None:
    assert build(url, timeout=1).score(pictures(1), [caption]).tolist() == [3]
    assert len(requests(url, caption)) == 2


@pytest.mark.parametrize("caption", ["429 seconds", "429 date"])
def test_retry_after_is_honoured(caption: str, url: str) -> None:
    assert build(url).score(pictures(1), [caption]).tolist() == [3]
    first, second = (request["at"] for request in requests(url, caption))
    assert second - first > 0.9


def test_back_off_doubles(url: str) -> None:
    build(url, retries=3, backoff=0.1).score(pictures(1), ["500 and again"])
    times = [request["at"] for request in requests(url, "500 and again")]
    waits = np.diff(times)
    assert len(waits) == 3
    assert (waits > [0.1, 0.2, 0.4]).all()


def test_concurrency_is_used_and_bounded() -> None:
    with chat_server() as url:
        scores = build(url, concurrency=3).score(pictures(9), [f"slow {k}" for k in range(9)])
        assert np.isfinite(scores).all()
        with urlopen(f"{url}/log") as answer:
            assert json.load(answer)["most_busy"] == 3


def test_several_servers_take_turns_and_stand_in_for_one_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    with chat_server() as one, chat_server() as two:
        reward = build([one, f"{two}/v1/"], concurrency=1)
        reward.score(pictures(4), [f"turn {k}" for k in range(4)])
        assert [len(requests(one, f"turn {k}")) for k in range(4)] == [1, 0, 1, 0]
        assert [len(requests(two, f"turn {k}")) for k in range(4)] == [0, 1, 0, 1]
    with chat_server() as two:
        reward = build([one, two])
        assert f"{one}: ConnectError: " in caplog.text
        assert reward.score(pictures(3), ["score 2"] * 3).tolist() == [2, 2, 2]


def test_key_from_the_environment_is_sent_and_never_shown(
    guarded_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    reward = build(guarded_url, api_key_env="JUDGE_KEY", retries=1)
    captions = ["score 3", "500 always", "400", "garbage", "drop", "half"]
    scores = reward.score(pictures(6), captions)
    assert scores[0] == 3
    assert np.isnan(scores[1:]).all()
    assert len(caplog.records) == 5
    assert KEY not in caplog.text
    assert KEY not in repr(reward)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("sk-wrong-secret", "401 Unauthorized; is the key right"),
        ("sk-secret\nwith-a-line-break", "JUDGE_KEY has blanks or other characters"),
        ("sk-secret-ключ", "JUDGE_KEY has blanks or other characters"),
        ("", "JUDGE_KEY is not set"),
    ],
)
def test_bad_key_ends_the_start_and_is_not_shown(
    key: str, expected: str, guarded_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ValueError, match=expected) as caught:
        build(guarded_url, api_key_env="JUDGE_KEY")
    chain: BaseException | None = caught.value
    while chain is not None:
        assert "secret" not in str(chain)
        assert "\n" not in str(chain)
        chain = chain.__cause__ or chain.__context__
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"base_urls": "http://127.0.0.1:1"}, r"^base_urls: no server can be used \(http://127.0.0.1:1: Connect"),
        ({"base_urls": []}, "^base_urls: none given"),
        ({"base_urls": "127.0.0.1:8000"}, "^base_urls: '127.0.0.1:8000' given; expected http://host:port"),
        ({"base_urls": "http://host:port"}, "^base_urls: 'http://host:port' given"),
        ({"base_urls": [8000]}, "^base_urls: 8000 given"),
        ({"served_model": "GPT"}, "^served_model: 'GPT' is not served; allowed are judge, other"),
        ({"concurrency": 0}, "^concurrency: 0 given; expected 1 or more"),
        ({"timeout": 0}, "^timeout: 0 given"),
        ({"retries": -1}, "^retries: -1 given"),
        ({"image_format": "gif"}, "^image_format: 'gif' is not one of png, jpeg"),
        ({"instruction": "Grade it."}, "^instruction: has no {prompt}"),
        ({"model": "judge"}, "unexpected keyword argument 'model'; its options: base_urls"),
    ],
)
def test_wrong_option_is_named_in_one_line(options: dict[str, Any], expected: str, url: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        build(**{"url": options.pop("base_urls", url)}, **options)
    assert "\n" not in str(caught.value)


def test_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="one with a user or password given") as caught:
        build("http://me:secret@127.0.0.1:8000")
    assert "secret" not in str(caught.value)


def test_wrong_pictures_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^reward unified_reward: images are float64 \[1, 6, 8, 3\]; expected"):
        build(url).score(pictures(1).astype(float), ["x"])


if __name__ == "__main__":
    serve()

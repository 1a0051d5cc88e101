"""UnifiedReward against a real HTTP server process that answers, and fails, by what the caption asks it to."""

import base64
import json
import logging
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.support.judge_server import (
    FAST,
    KEY,
    chat_server,
    requests,
    url,  # noqa: F401  fixtures
)


@pytest.fixture(scope="module")
def guarded_url() -> Iterator[str]:
    with chat_server(KEY) as address:
        yield address


def build(url: str | list[str], **options: Any) -> Any:
    from g2rpo_ray.rewards import build_reward

    return build_reward("unified_reward", base_urls=url, **FAST | options)


def pictures(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)


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
        ("Final Score: 4/5", 4),
        ("- __Final Score__ (1-5): `4.5` / 5", 4.5),
        ("3. **Final Score:** **4**", 4),
        ("Final Score: 4/10", None),
        ("Final Score: 4/50", None),
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
        ("cut", "truncated answer; raise max_tokens", 1),
        ("thought 4", "an answer that is only in reasoning_content; serve the model without --reasoning-parser", 1),
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


def test_carriage_returns_and_tokens_that_end_an_answer_are_no_part_of_it(url: str) -> None:
    assert build(url).score(pictures(2), ["tokens 4", "tokens 2.5/5"]).tolist() == [4, 2.5]


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
        ("sk-secret\nwith-a-line-break", "JUDGE_KEY has characters"),
        ("sk-secret-ключ", "JUDGE_KEY has characters"),
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
        ({"image_format": "gif"}, "^image_format: 'gif' given; allowed are png, jpeg"),
        ({"instruction": "Grade it."}, "^instruction: 'Grade it.' has no {prompt}"),
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

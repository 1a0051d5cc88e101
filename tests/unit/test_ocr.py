"""The OCR reward on rapidocr's own weights, which its wheel ships, and on text that is drawn here."""

import importlib.metadata
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from g2rpo_ray.rewards import build_reward, prompt_check
from g2rpo_ray.rewards.ocr import OCR, edit_distance, quoted, similarity


def drawn(*lines, colour="black", paper="white", height=36):
    picture = Image.new("RGB", (256, 256), paper)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(height)
    for at, line in enumerate(lines):
        pen.text((20, 20 + 60 * at), line, colour, font)
    return np.array(picture)


@pytest.fixture(scope="module")
def reward():
    return build_reward("ocr")


def test_what_is_drawn_is_read_and_a_picture_without_text_scores_0(reward):
    images = np.stack([drawn("Hello World"), drawn("Fresh", "Coffee", colour="white", paper="navy"), drawn()])
    prompts = ['a sign that says "hello wxyzd"', "a mug with “Fresh Coffee” on it", 'a sign that says "hello"']
    together = reward.score(images, prompts)
    np.testing.assert_allclose(together, [1 - 3 / 10, 1, 0], atol=1e-6)
    assert together.dtype == np.float32
    assert reward.score(images[1:2], prompts[1:2]) == together[1]  # whatever pictures are beside it


def test_strict_gives_no_credit_for_a_part_of_a_longer_text(reward):
    read = reward.read(drawn("OPEN NOW", "24 hours"))
    assert similarity(read, quoted('a shop, "open"'), "flow_grpo") == 1
    assert similarity(read, quoted('a shop, "open"'), "strict") == 0  # ten letters more than four
    assert similarity(read, quoted('a shop, "open now" above "24 hours"'), "strict") == 1
    assert similarity(read, quoted('a shop, "open now, 24 hours"'), "strict") == 1 - 1 / 15
    subject = OCR(lambda _: SimpleNamespace(txts=("the", "OPEN")), "strict")  # what an engine may have read
    assert subject.score(drawn()[None], ['"open"']) == 1 - 3 / 4


def test_colours_reach_the_engine_in_its_order():
    seen = []
    OCR(seen.append, "strict").score(np.array([[[[1, 2, 3]]]], np.uint8), ['"x"'])
    assert seen[0].tolist() == [[[3, 2, 1]]]


def flow_grpo(read, prompt):
    """The authors' own lines, on what an engine read (github.com/yifan123/flow_grpo, flow_grpo/ocr.py)."""
    prompt = prompt.split('"')[1]
    read = read.replace(" ", "").lower()
    prompt = prompt.replace(" ", "").lower()
    distance = 0 if prompt in read else levenshtein(read, prompt)
    return 1 - min(distance, len(prompt)) / len(prompt)


def levenshtein(first, second):
    @cache
    def cost(i, j):
        if not i or not j:
            return i + j
        return min(cost(i - 1, j) + 1, cost(i, j - 1) + 1, cost(i - 1, j - 1) + (first[i - 1] != second[j - 1]))

    return cost(len(first), len(second))


TEXT = st.text("abC d", max_size=9)


@given(TEXT, TEXT)
def test_the_common_definition_is_flow_grpos(read, text):
    assert edit_distance(read, text) == levenshtein(read, text)
    if text.strip():
        assert similarity(read, [text], "flow_grpo") == flow_grpo(read, f'a sign "{text}" and "another"')


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a "red" sign', ["red"]), ("a “red” sign", ["red"]), ('"a" and "b c"', ["a", "b c"]), ('"" or "b"', ["b"]),
        ("„Tür“, „Tor”, ”port”", ["Tür", "Tor", "port"]), ("«été» »alt«", ["été", "alt"]),
        ("「中」『文』＂字＂", ["中", "文", "字"]),
        ('写着"你好"', ["你好"]), ("a “12\" vinyl” and “it’s”", ['12" vinyl', "it’s"]), ('12″ of "JAZZ"', ["JAZZ"]),
        ('"says “hi”"', ["says “hi”"]),
    ],
)  # fmt: skip
def test_text_in_quotes(prompt, texts):
    assert quoted(prompt) == texts


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('A 12" vinyl record whose label says "JAZZ"', "for inches"),
        ('a 7" and a 12" record of "JAZZ"', "for inches"), ('5" by 7"', "for inches"),
        ("a cup” with “JAZZ”", "unmatched"), ("«open", "unmatched"),
        ('a "', "unmatched"), ("it's the dog's", "no quoted text"), ('"" or " "', "no quoted text"),
    ],
)  # fmt: skip
def test_a_prompt_whose_text_can_t_be_told_is_refused(prompt, words):
    check = prompt_check("ocr")
    with pytest.raises(ValueError, match=words) as refusal:
        check(prompt, {})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("read", "text"), [("IT'S", "it’s"), ("ＯＰＥＮ", "open"), ("cafe\u0301", "café"), ("ﬁne ½", "fine 1⁄2")]
)
def test_what_looks_the_same_is_the_same(read, text):
    assert similarity(read, [text], "strict") == similarity(text, [read], "strict") == 1


def test_a_prompt_without_quotes_is_missing_and_never_0(reward, caplog):
    assert np.isnan(reward.score(drawn()[None], ["a cat"])[0])
    assert "no score for 'a cat': it has no quoted text" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"definition": "loose"}, "^definition: 'loose' given; allowed are flow_grpo, strict$"),
        ({"device": "mps"}, "^device: 'mps' given; ocr allows cpu, cuda and cuda:N$"),
        ({"device": "cuda"}, "^device: cuda given, but this onnxruntime has no CUDA; pip install onnxruntime-gpu"),
    ],
)
def test_wrong_option_is_named_in_one_line(options, words):
    if options.get("device") == "cuda" and has_onnxruntime_gpu():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(ValueError, match=words):
        build_reward("ocr", **options)


def has_onnxruntime_gpu():
    return any(found.name == "onnxruntime-gpu" for found in importlib.metadata.distributions())


def test_an_engine_that_reads_nothing_is_refused_when_it_is_built(monkeypatch):
    import rapidocr

    monkeypatch.setattr(rapidocr.RapidOCR, "__call__", lambda *_: None)
    with pytest.raises(ValueError, match=r"^reward ocr: rapidocr reads '' in an image of 'Read me'; reinstall it$"):
        build_reward("ocr")


def test_wrong_pictures_are_refused_by_the_rewards_name(reward):
    with pytest.raises(ValueError, match="^reward ocr: images are float32"):
        reward.score(np.zeros((1, 4, 4, 3), np.float32), ['"a"'])

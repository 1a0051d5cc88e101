"""The other judges, against a real HTTP server process that looks at the pictures it is sent.

Run as a program, this file is that server: its model sees how much of each colour is in a picture, no more.
"""

import base64
import json
import logging
import math
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from g2rpo_ray.rewards import ask
from g2rpo_ray.rewards.judge import Unparsed
from tests.support.judge_server import FAST, Handler, chat_server, serve


class Seer(Handler):
    """Grades, compares, or answers with logprobs, as the question has it; captions say what goes wrong."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        *shown, question = body["messages"][0]["content"]
        seen = [
            np.array(Image.open(BytesIO(base64.b64decode(each["image_url"]["url"].split(",")[1])))) for each in shown
        ]
        amounts = [picture.mean(axis=(0, 1)) / 255 for picture in seen]
        with Handler.lock:
            told = {"messages": question["text"], "caption": question["text"], "pictures": len(shown)}
            Handler.log.append(body | told)
        if "logprobs" in body:
            self.listed(question["text"], amounts[-1])
        elif "edit" in question["text"]:  # how much redder the last one is than the first one, the source
            self.chat(f"{len(amounts)} pictures\nred={amounts[-1][0] - amounts[0][0]:.4f}")
        elif len(amounts) == 2:
            self.compare(question["text"], *amounts)
        else:
            self.grade(question["text"], amounts[0])

    def grade(self, question: str, amount: NDArray[np.float64]) -> None:
        lines = [
            f"{name} Score (1-5): {1 + 4 * part:.3f}"
            for name, part in zip(("Alignment", "Coherence", "Style"), amount, strict=True)
        ]
        if "prose" in question:
            self.chat("A fine picture; I would give four of five.")
        elif "two of three" in question:
            self.chat("\n".join(lines[:2]))
        elif "share of red" in question:
            self.chat(f"Well.\nred={amount[0]:.4f}\n")
        else:
            self.chat("\n".join(lines))

    def compare(self, question: str, first: NDArray[np.float64], second: NDArray[np.float64]) -> None:
        """The redder one; of pictures that are blue, and of some others, it talks."""
        if any(picture[2] > 0.6 or int(1e4 * picture.sum()) % 7 == 5 for picture in (first, second)):
            return self.chat("<think>hard</think> Both have their charms.")
        which = (
            "Both images are equally good" if first[0] == second[0] else f"Image {1 + (second[0] > first[0])} is better"
        )
        if "first is best" in question:
            which = "Image 1 is better"
        return self.chat(f"<think>Image 2 is better in style</think>\n<answer>{which}</answer>")

    def listed(self, question: str, amount: NDArray[np.float64]) -> None:
        if "prose" in question:
            return self.chat("Yes")
        if "thought" in question:  # one token, which a parser took for thinking; its probabilities say nothing
            token = {"top_logprobs": [{"token": "The", "logprob": -0.1}]}
            choice = {"message": {"content": None, "reasoning": "The"}, "logprobs": {"content": [token]}}
            return self.answer(200, {"choices": [choice]})
        share = float(amount[0])
        probabilities = {"Yes": 0.75 * share, " yes": 0.25 * share, "No": 1 - share - 0.001, "Maybe": 0.001}
        if question.startswith("How many"):
            probabilities = {"three": 0.5, "3": 0.25, "Three": 0.125, "four": 0.0625, "<|im_end|>": 0.03125}
        top = [{"token": token, "logprob": math.log(max(p, 1e-9))} for token, p in probabilities.items()]
        first = {**top[0], "top_logprobs": top}
        choice = {"message": {"content": "Yes"}, "finish_reason": "length", "logprobs": {"content": [first]}}
        return self.answer(200, {"choices": [choice]})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with chat_server(module=__name__) as address:
        yield address


def build(kind: str, url: str, **options: Any) -> Any:
    from g2rpo_ray.rewards import build_reward

    return build_reward(kind, base_urls=url, **FAST | options)


def flat(*colours: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.stack([np.full((4, 6, 3), colour, np.uint8) for colour in colours])


def requests(url: str, part: str) -> list[dict[str, Any]]:
    with urlopen(f"{url}/log") as answer:
        return [body for body in json.load(answer)["requests"] if part in body["messages"]]


def test_unified_reward_2_gives_three_rewards_from_one_request(url: str) -> None:
    images = flat((255, 51, 0), (0, 102, 255))
    reward = build("unified_reward_2", url, part="coherence")
    parts = reward.score_parts(images, ["a flag"] * 2)
    np.testing.assert_allclose(parts["alignment"], [5, 1])
    np.testing.assert_allclose(parts["coherence"], [1.8, 2.6])
    np.testing.assert_allclose(parts["style"], [1, 5])
    asked = requests(url, "[a flag]")
    assert len(asked) == 2
    assert {(body["temperature"], body["max_tokens"]) for body in asked} == {(0, 1024)}
    assert asked[0]["messages"].startswith("You are presented with a generated image and its associated text caption. ")
    assert reward.score(images, ["a flag"] * 2).tolist() == parts["coherence"].tolist()


@pytest.mark.parametrize("kind", ["unified_reward_2", "judge", "pairwise", "soft_tifa"])
def test_a_judge_that_answers_prose_gives_no_score(kind: str, url: str, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, dict[str, Any]] = {
        "unified_reward_2": {"part": "style"},
        "judge": {"instruction": "{prompt}", "pattern": "score=([0-9.]+)"},
        "pairwise": {"instruction": "{prompt}"},
        "soft_tifa": {"part": "arithmetic"},
    }
    more = [[{"vqa_list": [["Is it prose?", "Yes"]]}] * 2] if kind == "soft_tifa" else []
    blue = flat((0, 0, 255), (0, 0, 200))
    scores = build(kind, url, **options[kind]).score(blue, ["prose"] * 2, *more)
    assert scores.dtype == np.float32
    assert np.isnan(scores).all()
    assert {record.getMessage().partition(": no score for 'prose': ")[0] for record in caplog.records} == {kind}
    assert "charms" not in caplog.text


def test_an_answer_that_lacks_one_of_three_grades_has_the_others(url: str, caplog: pytest.LogCaptureFixture) -> None:
    parts = build("unified_reward_2", url, part="style").score_parts(flat((255, 51, 0)), ["two of three"])
    assert list(parts) == ["alignment", "coherence", "style"]
    np.testing.assert_allclose(list(parts.values()), [[5], [1.8], [np.nan]])
    assert "no score for 'two of three': no single 'Style Score: 1…5' in the answer" in caplog.text


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Alignment Score (1-5): 4", 4),
        ("Well.\n**Alignment Score (1-5):** 4\nCoherence Score (1-5): 2", 4),
        ("- **Alignment Score** (1–5): 3.5/5\n- Coherence Score (1-5): 2/5", 3.5),
        ("1. Alignment Score: 4 / 5.\n2. Coherence Score: 2", 4),
        ("Alignment Score (1-5): 4/6", None),
        ("Alignment Score (1-5): 4\nAlignment Score (1-5): 5", None),
        ("Alignment Score (1-5): X\nCoherence Score (1-5): 4", None),
        ("Alignment Score (1-5): 9", None),
    ],
)
def test_a_part_is_read_as_models_write_it(answer: str, expected: float | None) -> None:
    from g2rpo_ray.rewards.judge import Unparsed
    from g2rpo_ray.rewards.unified_reward_2 import GRADES

    if expected is not None:
        assert GRADES["alignment"](answer) == expected
        return
    with pytest.raises(Unparsed, match="no single 'Alignment Score: 1…5' in the answer"):
        GRADES["alignment"](answer)


def test_template_of_ones_own_is_read_strictly(url: str, caplog: pytest.LogCaptureFixture) -> None:
    own = {"instruction": "The share of red, for {prompt}?", "pattern": r"^red=([0-9.]+)$"}
    scores = build("judge", url, **own).score(flat((255, 0, 0), (51, 0, 0)), ["this", "that"])
    np.testing.assert_allclose(scores, [1, 0.2], atol=1e-6)
    assert np.isnan(build("judge", url, highest=0.5, **own).score(flat((255, 0, 0)), ["this"])).all()
    assert "no single match of '^red=([0-9.]+)$' from 0 to 0.5 in the answer" in caplog.text


def test_a_judge_says_how_long_its_scores_may_take(url: str) -> None:
    """Four attempts of three times 60 s, and three waits of 60 s between them, a question."""
    from g2rpo_ray.config import RewardConfig
    from g2rpo_ray.rewards import max_duration_s

    def of(kind: str, images: int, **options: Any) -> float:
        reward = build(kind, url, timeout=60.0, concurrency=4, **options)
        assert reward.waits == (4 * 180 + 3 * 60, 4)
        config, group = RewardConfig(kind=kind, batch_size=6), getattr(reward, "scope", "") == "group"
        return max_duration_s(config, images, METADATA, reward.waits, group) / (4 * 180 + 3 * 60)

    assert of("unified_reward_2", 4, part="style") == 1
    assert of("unified_reward", 8) == 4  # six in two goes, two in another: counted as two times six
    assert of("soft_tifa", 4, part="geometric") == 2  # two questions each
    assert of("pairwise", 8, both_orders=True) == 14  # 56 questions, of the whole group
    assert max_duration_s(RewardConfig(kind="hpsv2"), 8, {}, (0.0, 1), group=False) == 0


METADATA = {"vqa_list": [["Is it red?", "Yes"], ["How many shapes are in the image?", "three"]]}


def test_soft_tifa_is_the_probability_of_the_expected_answers(url: str) -> None:
    """The right tokens: Yes and ' yes' together have the share of red; three, Three and 3 have 0.875."""
    images = flat((255, 0, 0), (51, 0, 0))
    reward = build("soft_tifa", url, part="geometric")
    parts = reward.score_parts(images, ["p", "p"], [METADATA] * 2)
    np.testing.assert_allclose(parts["arithmetic"], [(1 + 0.875) / 2, (0.2 + 0.875) / 2], rtol=1e-6)
    np.testing.assert_allclose(parts["geometric"], np.sqrt([1 * 0.875, 0.2 * 0.875]), rtol=1e-6)
    asked = requests(url, "Answer in one word.")
    assert {body["messages"] for body in asked if "red" in body["messages"]} == {"Is it red? Answer in one word."}
    assert all((body["max_tokens"], body["top_logprobs"], body["temperature"]) == (1, 20, 0) for body in asked)


def test_the_first_token_of_what_a_model_thinks_is_no_answer(url: str, caplog: pytest.LogCaptureFixture) -> None:
    thought = [{"vqa_list": [["Is it thought?", "Yes"]]}]
    assert np.isnan(build("soft_tifa", url, part="arithmetic").score(flat((9, 9, 9)), ["p"], thought)).all()
    assert "an answer that is only in reasoning; serve the model without --reasoning-parser" in caplog.text


def test_an_answer_that_is_not_listed_has_what_the_least_listed_has() -> None:
    from g2rpo_ray.rewards.soft_tifa import probability

    listed = {"one": 0.9, " 1": 0.05, "One": 0.03, "two": 0.01, "ONE": 0.005}
    assert probability(listed, "one") == pytest.approx(0.98)
    assert probability(listed, "Yes") == 0.005
    assert probability({"Yes": 0.7, "yes": 0.2, " Yes": 0.2}, "Yes") == 1


def test_soft_tifa_s_spellings_are_those_of_the_published_evaluation() -> None:
    """Its lists, written down: `evaluation.py` of facebookresearch/GenEval2, soft_tifa()."""
    from g2rpo_ray.rewards.soft_tifa import probability

    for answer, published in (
        ("Yes", ["Yes", "yes", " yes", " Yes"]),
        ("four", ["four", "Four", " four", " Four", "4", " 4"]),
        ("ten", ["ten", "Ten", " ten", " Ten", "10", " 10"]),
    ):
        each = 0.1
        others = {"other": 0.01, "Four5": each, "YES": each, "  yes": each}
        assert probability(dict.fromkeys(published, each) | others, answer) == pytest.approx(each * len(published))


def test_geneval_2_s_own_file_has_what_soft_tifa_asks(tmp_path: Path) -> None:
    from g2rpo_ray.data import read_records
    from g2rpo_ray.rewards import prompt_check

    pairs = [["How many toys are in the image?", "two"], ["Are the toys metal?", "Yes"]]
    line = {"prompt": "two metal toys", "atom_count": 3, "vqa_list": pairs, "skills": ["count", "attribute"]}
    (tmp_path / "geneval2_data.jsonl").write_text(json.dumps(line) + "\n")
    assert read_records(str(tmp_path / "geneval2_data.jsonl"), "key") == {"two metal toys": {"vqa_list": pairs}}
    check = prompt_check("soft_tifa")
    check("two metal toys", {"vqa_list": pairs})
    for wrong in (
        {},
        {"vqa_list": []},
        {"vqa_list": [["Is it?"]]},
        {"vqa_list": "toys"},
        {"vqa_list": [["Is it?", ""]]},
    ):
        with pytest.raises(ValueError, match="^has no vqa_list in its metadata, which soft_tifa needs; give pairs"):
            check("two metal toys", wrong)


def test_pairwise_gives_the_share_of_the_group_that_is_beaten(url: str) -> None:
    images = flat((0, 0, 0), (200, 0, 0), (100, 0, 0), (200, 0, 0))
    assert build("pairwise", url).score(images, ["red"] * 4).tolist() == pytest.approx([0, 5 / 6, 1 / 3, 5 / 6])
    assert len(requests(url, "[red]")) == 6
    assert build("pairwise", url, both_orders=True).score(images, ["rot"] * 4).tolist() == pytest.approx(
        [0, 5 / 6, 1 / 3, 5 / 6]
    )
    assert len(requests(url, "[rot]")) == 12
    assert np.isnan(build("pairwise", url).score(images[:1], ["alone"])).all()


def test_a_judge_is_asked_by_the_text_of_a_file(url: str, tmp_path: Path) -> None:
    """Pref-GRPO's text for UnifiedReward-Think-qwen3vl is long, has its own brackets and indented lines."""
    file = tmp_path / "think.txt"
    file.write_text(
        "Which is better?\n\n    1. The caption is: 「{prompt}」 {x}\n        Text Caption: [{prompt}]\n", "utf-8"
    )
    reward = build("pairwise", url, instruction=str(file))
    assert reward.score(flat((0, 0, 0), (200, 0, 0)), ["by file"] * 2).tolist() == [0, 1]
    (asked,) = requests(url, "「by file」 {x}\n        Text")
    assert asked["messages"] == file.read_text("utf-8").replace("{prompt}", "by file")


def test_a_judge_that_prefers_a_place_is_seen_through_in_both_orders(url: str) -> None:
    images = flat((0, 0, 0), (200, 0, 0))
    assert build("pairwise", url).score(images, ["first is best"] * 2).tolist() == [1, 0]
    assert build("pairwise", url, both_orders=True).score(images, ["first is best"] * 2).tolist() == [0.5, 0.5]


def test_a_picture_that_can_not_be_compared_leaves_the_others_alone(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """The judge talks where a picture is blue: that one has no score, the others are compared among themselves."""
    caplog.set_level(logging.WARNING)
    images = flat((10, 0, 0), (0, 0, 255), (200, 0, 0), (100, 0, 0))
    scores = build("pairwise", url).score(images, ["a group"] * 4)
    assert scores[[0, 2, 3]].tolist() == [0, 1, 0.5]
    assert np.isnan(scores[1])
    assert len(caplog.records) == 3


def test_win_rates_by_any_score_are_those_counted_one_by_one() -> None:
    from g2rpo_ray.algo.win_rate import win_rates

    scores = np.random.default_rng(0).integers(0, 5, 12).astype(np.float32)
    scores[3] = np.nan
    counted = np.full(12, np.nan, np.float32)
    for place, score in enumerate(scores):
        others = [other for at, other in enumerate(scores) if at != place and not np.isnan(other)]
        if not np.isnan(score):
            counted[place] = np.mean([0.5 if score == other else float(score > other) for other in others])
    np.testing.assert_allclose(win_rates(scores), counted, rtol=1e-6)
    assert np.nanmean(win_rates(scores)) == pytest.approx(0.5)
    assert np.isnan(win_rates(np.array([1, np.nan], np.float32))).all()


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("unified_reward_2", {}, "missing a required argument: 'part'; its options: base_urls, part"),
        ("unified_reward_2", {"part": "beauty"}, "^part: 'beauty' given; allowed are alignment, coherence, style"),
        ("soft_tifa", {"part": "gm"}, "^part: 'gm' given; allowed are arithmetic, geometric"),
        ("judge", {"instruction": "{prompt}", "pattern": "("}, r"^pattern: '\(' is not a regular expression"),
        ("judge", {"instruction": "{prompt}", "pattern": "x"}, "^pattern: 'x' has 0 groups; expected one"),
        ("judge", {"instruction": " ", "pattern": "(.)"}, "^instruction: has no {prompt}"),
        ("judge", {"instruction": "none", "pattern": "(.)"}, "^instruction: 'none' has no {prompt} and is not a file"),
        ("judge", {"instruction": "x" * 300, "pattern": "(.)"}, "^instruction: 'x+' has no {prompt} and is not a file"),
        ("judge", {"instruction": "embedded:config.yaml", "pattern": "(.)"}, "^instruction: the file .* no {prompt}"),
        ("judge", {"instruction": "{prompt}", "pattern": "(.)", "lowest": 2}, "^lowest: 2 given; expected less than"),
        ("pairwise", {"pattern": "(1)|(2)"}, "^pattern: .* expected the named groups first, second"),
        ("pairwise", {"instruction": "?"}, "^instruction: '.' has no {prompt} and is not a file"),
        ("pairwise", {"model": "x"}, "unexpected keyword argument 'model'; its options: base_urls"),
    ],
)
def test_wrong_option_is_named_in_one_line(kind: str, options: dict[str, Any], expected: str, url: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        build(kind, url, **options)
    assert "\n" not in str(caught.value)


if __name__ == "__main__":
    serve(Seer)


@pytest.mark.parametrize("frames", ["all", [0, -1], "last"])
def test_a_judge_of_videos_sees_the_frames_in_one_question(url: str, frames: Any) -> None:
    """It tells how much redder the last picture is than the first one; sources precede the frames."""
    video = np.stack([flat((50, 0, 0), (0, 0, 0), (101, 0, 0))] * 2)
    reward = build("judge", url, instruction="edit {prompt}", pattern="red=([-0-9.]+)", lowest=-1, video=True)
    found = ask(reward, video, ["p"] * 2, [{}, {"source": (flat((203, 0, 0))[0],)}], frames)
    np.testing.assert_allclose(found, [0.0 if frames == "last" else 0.2, -0.4], atol=1e-4)
    number = {"all": 3, "last": 1}.get(str(frames), 2)
    tokens = build("answer_tokens", url, instruction="{prompt}?", answers=["no", "yes"], video=True)
    assert ask(tokens, video, ["p"] * 2, [{}, {}], frames) == pytest.approx([101 / 255] * 2, abs=0.01)
    assert [body["pictures"] for body in requests(url, "p?")[-2:]] == [number] * 2


def test_a_judge_of_videos_refuses_pictures_of_another_shape(url: str) -> None:
    reward = build("judge", url, instruction="{prompt}", pattern="(.)", video=True)
    with pytest.raises(ValueError, match=r"^reward judge: images are uint8 \[1, 4, 6, 3\]; .* \[N, F, H, W, 3\]$"):
        reward.score(flat((0, 0, 0)), ["p"])


def test_judges_of_edits_are_shown_the_source_first(url: str) -> None:
    """A prompt without source is judged by its picture alone, and so is every prompt by graders of one picture."""
    images, known = np.concatenate([flat((200, 0, 0)), flat((100, 0, 0))]), {"source": (flat((50, 0, 0))[0],)}
    options = {"instruction": "edit {prompt}", "pattern": r"^red=(-?[0-9.]+)$", "lowest": -1.0}
    scores = build("judge", url, **options).score(images, ["p"] * 2, [known, {}])
    assert scores.tolist() == pytest.approx([150 / 255, 0], abs=1e-3)
    counted = build("judge", url, **options | {"pattern": r"^(\d) pictures$", "highest": 9.0})
    assert ask(counted, images, ["p"] * 2, [known, {}]).tolist() == [2, 1]
    told = build("pairwise", url, instruction="edit {prompt}", pattern=r"(?P<first>3 pictures)|(?P<second>2 pictures)")
    assert told.score(images, ["p"] * 2, [known] * 2).tolist() == [1, 0]
    assert told.score(images, ["p"] * 2).tolist() == [0, 1]
    graded = build("unified_reward_2", url, part="alignment")
    assert ask(graded, images, ["p"] * 2, [known] * 2).tolist() == graded.score(images, ["p"] * 2).tolist()


def test_answer_tokens_is_the_mean_grade_by_the_first_token_s_probabilities(url: str) -> None:
    reward = build("answer_tokens", url, instruction="{prompt}?", answers=["no", "maybe", "yes"])
    image = flat((153, 0, 0))  # .6: of the answers "No" has .399, "Maybe" .001, "Yes" and " yes" .6 together
    scores = ask(reward, np.concatenate([image] * 2), ["p"] * 2, [{}, {"source": (flat((0, 0, 0))[0],)}])
    assert scores.tolist() == pytest.approx([0.6 + 0.5 * 0.001] * 2, abs=1e-4)
    assert reward.grade({"Yes": 0.3, "no": 0.3, "The": 0.4}) == pytest.approx(0.5)
    with pytest.raises(Unparsed, match=r"have 0\.40 of the first token's probability"):
        reward.grade({"Yes": 0.4, "The": 0.6})
    grades = build("answer_tokens", url, instruction="{prompt}?")
    assert grades.grade({"5": 0.5, "3": 0.25, " 0": 0.25}) == pytest.approx(0.5 + 0.25 * 3 / 5)
    assert np.isnan(grades.score(image, ["p"], [{}])).all()  # yes and no are none of its answers
    with pytest.raises(ValueError, match=r"^answers: \['yes', 'Yes '\] given; give two or more different texts"):
        build("answer_tokens", url, instruction="{prompt}?", answers=["yes", "Yes "])

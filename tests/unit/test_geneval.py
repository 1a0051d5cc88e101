"""GenEval: its rules on given objects, and small detectors and a small CLIP in the formats that transformers saves."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
)

from g2rpo_ray.rewards import prompt_check
from g2rpo_ray.rewards.features import CLIP_MEAN, CLIP_STD
from g2rpo_ray.rewards.geneval_rules import (
    COLOURS,
    Found,
    check_prompt,
    judge,
    keep,
    overlap,
    parse_specification,
    relations,
)
from tests.support.geneval_files import (
    CAT,
    IMAGES,
    METADATA,
    built,
    folder,  # noqa: F401  fixtures
)


def found(score=0.95, left=0, top=0, width=10, height=10):
    return Found(score, np.array([left, top, left + width, top + height], float))


RED = CAT | {"color": "red"}

TWO = CAT | {"count": 2}

LEFT = [{"class": "dog", "count": 1}, CAT | {"position": ["left of", 0]}]

NONE, ONE, PAIR, THREE = ([found(left=40 * at) for at in range(count)] for count in range(4))

FAR = [found(left=100)]

CASES = [  # include, exclude, objects, their colours: published, strict, graded
    ([CAT], [], {"cat": ONE}, "", 1, 1, 1),
    ([CAT], [], {}, "", 0, 0, 0),
    ([CAT], [], {"cat": PAIR}, "", 1, 0, 0),  # 1 − |1 − 2| / 1
    ([CAT], [], {"cat": THREE}, "", 1, 0, -1),  # 1 − |1 − 3| / 1: negative, as released
    ([TWO], [CAT | {"count": 3}], {"cat": PAIR}, "", 1, 1, 1),
    ([TWO], [CAT | {"count": 3}], {"cat": THREE}, "", 0, 0, 1 / 2),
    ([TWO], [], {"cat": ONE}, "", 0, 0, 1 / 2),
    ([CAT, {"class": "dog", "count": 1}], [], {"cat": ONE}, "", 0, 0, 1 / 2),
    ([CAT], [{"class": "dog", "count": 1}], {"cat": ONE, "dog": ONE}, "", 0, 1, 1),  # Flow-GRPO ignores exclude
    ([RED], [], {"cat": ONE}, "red", 1, 1, 1),
    ([RED], [], {"cat": ONE}, "blue", 0, 0, 1 / 2),
    ([RED], [], {"cat": PAIR}, "red blue", 1, 0, 0),  # the best one alone counts; count 0, colour not looked at: 0
    ([RED], [], {}, "", 0, 0, 0),
    ([TWO | {"color": "red"}], [], {"cat": PAIR}, "red blue", 0, 0, 3 / 4),
    ([RED, {"class": "dog", "count": 1, "color": "blue"}], [], {"cat": ONE, "dog": ONE}, "red", 0, 0, 3 / 4),
    (LEFT, [], {"dog": FAR, "cat": ONE}, "", 1, 1, 1),
    (LEFT, [], {"dog": ONE, "cat": FAR}, "", 0, 0, 3 / 4),  # counts 1 and 1, then a 0 and a 1
    (LEFT, [], {"cat": ONE}, "", 0, 0, 1 / 3),  # counts 0 and 1, no target: 0
    (LEFT, [], {"dog": FAR}, "", 0, 0, 1 / 3),  # counts 1 and 0, place not looked at: 0
]  # fmt: skip


@pytest.mark.parametrize(("include", "exclude", "objects", "colours", "published", "strict", "graded"), CASES)
def test_scores_of_given_objects_are_those_computed_by_hand(
    include, exclude, objects, colours, published, strict, graded
):
    wanted = parse_specification({"tag": "x", "include": include, "exclude": exclude})

    def name_colours(kind, some):
        return colours.split()[: len(some)]

    scores = [judge(wanted, objects, name_colours, name) for name in ("published", "strict", "graded")]
    assert scores == pytest.approx([published, strict, graded])


@pytest.mark.parametrize(
    ("left", "top", "expected"),
    [
        (30, 0, {"right of"}), (-30, 0, {"left of"}), (0, 30, {"below"}), (0, -30, {"above"}),
        (0, 0, set()), (2, 0, set()), (2, 2, set()),  # nearer than a tenth of both widths, 2
        (3, 0, set()), (5, 0, {"right of"}),  # the slack goes off before the half: (3 − 2) / 3, (5 − 2) / 5
        (30, 30, {"right of", "below"}), (30, 9, {"right of"}), (-20, 20, {"left of", "below"}),
    ],
)  # fmt: skip
def test_relations_need_a_distance_that_grows_with_the_objects(left, top, expected):
    assert relations(found(left=left, top=top), found()) == expected


def test_metadata_is_checked_before_the_start():
    assert prompt_check("geneval") is check_prompt
    check_prompt("a cat", METADATA | {"include": [RED, CAT | {"position": ["above", 0]}], "id": 3})


def test_what_is_kept_is_above_the_threshold_sixteen_at_most_and_overlaps_nothing_better():
    many = [found(0.99 - at / 100, left=100 * at) for at in range(20)]
    assert keep({"cat": many}, 0.3, 1.0)["cat"] == many[:16]
    assert keep({"cat": many}, 0.9, 1.0)["cat"] == many[:9]  # .9 itself is not above it
    near = [found(0.9), found(0.8, left=1), found(0.7, left=50)]
    assert overlap(near[0].box, near[1].box) == pytest.approx(110 / 132)
    assert keep({"cat": near}, 0.3, 1.0)["cat"] == near
    assert keep({"cat": near}, 0.3, 0.5)["cat"] == [near[0], near[2]]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "has no metadata; geneval needs include, tag and exclude for each prompt"),
        ({"tag": "counting"}, "has wrong metadata: Value error, include is empty"),
        ({"include": [{"class": "cat"}]}, "has wrong metadata: include.0.count: Field required"),
        ({"include": [CAT | {"color": "beige"}]}, "include.0.color: Input should be 'red', 'orange'"),
        ({"include": [CAT | {"position": ["beside", 0]}]}, "include.0.position.0: Input should be 'left of'"),
        ({"include": [CAT | {"position": ["above", 0]}]}, "position must name an earlier clause"),
        ({"include": [CAT | {"colour": "red"}]}, "include.0.colour: Extra inputs are not permitted"),
        ({"include": [CAT | {"count": 0}]}, "include.0.count: Input should be greater than or equal to 1"),
    ],
)
def test_metadata_that_is_no_specification_is_told_in_one_line(metadata, words):
    with pytest.raises(ValueError, match="^has ") as caught:
        check_prompt("a cat", metadata)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def by_the_papers_code(folder, image):
    """Boxes, scores and masks of every pair of query and class, as mmdet's Mask2Former computes them: all in full."""
    network = Mask2FormerForUniversalSegmentation.from_pretrained(folder / "mask2former").eval()
    picture = TF.resize(torch.from_numpy(image).permute(2, 0, 1), [64, 104], InterpolationMode.BILINEAR)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    processor = Mask2FormerImageProcessor.from_pretrained(folder / "mask2former")
    size = {"shortest_edge": 64, "longest_edge": 107}
    pixels = processor(Image.fromarray(image), size=size, size_divisor=0, return_tensors="pt")["pixel_values"][0]
    one_level = 1 / 255 / 0.224 + 1e-6  # the last bit of a pixel, which its resize may round otherwise
    assert (pixels - (picture / 255 - mean[:, None, None]) / std[:, None, None]).abs().max() <= one_level
    padded = torch.zeros(1, 3, 64, 128)
    padded[..., :104] = pixels
    with torch.no_grad():
        output = network(pixel_values=padded)
    masks = F.interpolate(output.masks_queries_logits, (64, 128), mode="bilinear")[..., :104]
    masks = F.interpolate(masks, (48, 78), mode="bilinear")[0].numpy().astype(np.float64)
    probabilities = output.class_queries_logits[0].softmax(-1)[:, :3].numpy()
    objects = {name: [] for name in ("cat", "computer mouse", "dog")}
    for query, mask in enumerate(masks):
        certainty = (1 / (1 + np.exp(-mask[mask > 0]))).mean() if (mask > 0).any() else 0
        rows, columns = np.nonzero(mask > 0)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0] * 4
        for kind, name in enumerate(objects):
            objects[name].append((probabilities[query, kind] * certainty, box, mask > 0))
    return {name: sorted(some, key=lambda one: -one[0]) for name, some in objects.items()}


def test_mask2former_is_read_as_the_published_scorer_reads_it(folder):
    detector = built(folder, threshold=0.05)._detector
    with torch.no_grad():
        objects = detector.find(IMAGES, ["cat", "computer mouse", "dog"])
    for image, seen in zip(IMAGES, objects, strict=True):
        expected = by_the_papers_code(folder, image)
        assert sum(map(len, seen.values())) >= 6
        for name, some in seen.items():
            sure = [one for one in some if one.score > 0.051]
            wanted = [one for one in expected[name] if one[0] > 0.051]
            assert [one.score for one in sure] == pytest.approx([score for score, _, _ in wanted], abs=1e-3)
            for one, (_, box, mask) in zip(sure, wanted, strict=True):
                assert np.abs(one.box - box).max() <= 1
                assert (one.mask == mask).mean() > 0.99
    assert detector.unknown(["cat", "mouse", "computer mouse", "tree"]) == ["mouse", "tree"]


@pytest.mark.parametrize("definition", ["published", "strict", "graded"])
@pytest.mark.parametrize("tag", ["two_object", "counting"])
def test_the_reward_is_its_rules_on_what_its_detector_finds(folder, definition, tag):
    reward = built(folder, definition=definition, counting_threshold=0.4)
    with torch.no_grad():
        objects = reward._detector.find(IMAGES, ["cat", "computer mouse"])
    threshold = 0.4 if tag == "counting" else 0.2
    wanted = METADATA | {"tag": tag}
    expected = [judge(parse_specification(wanted), keep(some, threshold, 1), None, definition) for some in objects]
    scores = reward.score(IMAGES, ["x"] * 2, [wanted] * 2)
    assert scores.dtype == np.float32
    assert scores.tolist() == pytest.approx(expected)
    assert reward.score(IMAGES[1:], ["x"], [wanted])[0] == scores[1]
    assert sum(map(len, keep(objects[0], 0.2, 1).values())) > sum(map(len, keep(objects[0], 0.4, 1).values()))


def test_colours_are_those_of_clip_on_the_object_on_grey(folder):
    namer = built(folder)._colours
    mask = np.zeros((48, 78), bool)
    mask[10:30, 20:60] = np.random.default_rng(0).random((20, 40)) > 0.3
    objects = [Found(0.9, np.array([20, 10, 60, 30.4]), mask), Found(0.8, np.array([0, 0, 33, 47.6]))]
    network = CLIPModel.from_pretrained(folder / "clip" / "model").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip" / "model")
    picture = Image.fromarray(IMAGES[0])
    grey = Image.composite(picture, Image.new("RGB", (78, 48), "#999"), Image.fromarray(mask))
    crops = [grey.crop((20, 10, 60, 30.4)), picture.crop((0, 0, 33, 47.6))]
    steps = [Resize(16, InterpolationMode.BICUBIC), CenterCrop(16), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)]
    with torch.no_grad():
        directions = []
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} cat",
                f"a photo of a {colour}-colored cat",
                f"a photo of a {colour} object",
            ]
            tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
            features = F.normalize(network.get_text_features(**tokens).pooler_output, dim=-1)
            directions.append(F.normalize(features.mean(0), dim=0))
        pixels = torch.stack([Compose(steps)(crop) for crop in crops])
        features = F.normalize(network.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        torch.testing.assert_close(namer._colours_of("cat"), torch.stack(directions), atol=1e-5, rtol=0)
        expected = (features @ torch.stack(directions).T).argmax(1)
        assert namer.name(IMAGES[0], "cat", objects) == [COLOURS[index] for index in expected]


@pytest.mark.parametrize("detector", ["owl", "dino"])
def test_detectors_that_take_text_find_what_transformers_own_reading_finds(folder, detector):
    reward = built(folder, detector, threshold=0.3)
    with torch.no_grad():
        objects = reward._detector.find(IMAGES, ["cat", "dog"])
    network, processor = reward._detector._network, reward._detector._processor
    for image, seen in zip(IMAGES, objects, strict=True):
        inputs = processor(
            images=Image.fromarray(image), text=["cat"] if detector == "owl" else "cat.", return_tensors="pt"
        )
        with torch.no_grad():
            output = network(**inputs)
        (expected,) = processor.post_process_grounded_object_detection(output, threshold=0.3, target_sizes=[(48, 78)])
        assert [one.score for one in seen["cat"]] == pytest.approx(sorted(expected["scores"].tolist())[::-1], abs=1e-4)
    assert any(some["cat"] for some in objects)
    assert np.isfinite(reward.score(IMAGES, ["x"] * 2, [{"include": [RED]}] * 2)).all()
    assert reward._detector.unknown(["anything"]) == []


def test_what_cannot_be_judged_is_missing_and_never_0(folder, caplog):
    reward = built(folder)
    wanted = {"include": [{"class": "unicorn", "count": 1}]}
    scores = reward.score(np.concatenate([IMAGES, IMAGES[:1]]), ["a", "b", "c"], [{}, wanted, METADATA])
    assert np.isnan(scores[:2]).all()
    assert np.isfinite(scores[2])
    assert "no score for 'a': it has no metadata" in caplog.text
    assert "no score for 'b': the detector does not know unicorn" in caplog.text


@pytest.mark.parametrize("detector", ["mask2former", "owl"])
def test_a_network_that_overflows_gives_no_scores(folder, detector):
    reward = built(folder, detector)
    for network in (reward._detector._network, reward._colours._network):
        for weight in network.parameters():
            weight.fill_(torch.nan)
    words = "a network's output is not a number; give dtype: float32 or bfloat16"
    with pytest.raises(ArithmeticError, match=words):
        reward.score(IMAGES, ["x"] * 2, [{"include": [RED]}] * 2)
    with pytest.raises(ArithmeticError, match=words), torch.no_grad():
        reward._colours.name(IMAGES[0], "cat", ONE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"definition": "lenient"}, "^definition: 'lenient' given; allowed are graded, strict, published$"),
        ({"threshold": 0}, "^threshold: 0 given; must be above 0 and at most 1$"),
        ({"max_overlap": 2}, "^max_overlap: 2 given"),
        ({"size": 8000}, "^size: 8000 given; must be from 32 to 1333 pixels$"),
        ({"detector": "clip/model"}, "^model: AutoModelForZeroShotObjectDetection cannot load"),
        ({"detector": "none"}, "^model: no directory"),
    ],
)
def test_wrong_option_is_named_in_one_line(folder, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        built(folder, **options)
    assert "\n" not in str(caught.value)


def test_a_detector_that_lacks_a_weight_is_refused(folder, tmp_path):
    network = Mask2FormerForUniversalSegmentation.from_pretrained(folder / "mask2former")
    weights = network.state_dict()
    del weights["class_predictor.weight"]
    network.save_pretrained(tmp_path / "broken", state_dict=weights)
    (tmp_path / "clip").symlink_to(folder / "clip")
    with pytest.raises(ValueError, match=r"^model: .* is not a complete Mask2FormerFor.*class_predictor"):
        built(tmp_path, "broken")
    assert json.loads((tmp_path / "broken" / "config.json").read_text())["model_type"] == "mask2former"

"""The published reward models: small checkpoints in the real file formats, against the packages they come from.

Where a package can't be imported (ImageReward's, the aesthetic predictor's), the reference is written out here from the
authors' code, on the checkpoint's own keys.
"""

import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BertTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from g2rpo_ray.config import RewardConfig
from g2rpo_ray.rewards import KINDS, build_reward, check_reward
from g2rpo_ray.rewards.clip import load_architecture
from g2rpo_ray.rewards.features import CLIP_MEAN, CLIP_STD, clip_pixels
from g2rpo_ray.rewards.imagereward import ARCHITECTURE, MEAN, STD, Network, load_tokenizer
from g2rpo_ray.rewards.options import REQUIRED, has_device, option_defaults
from tests.support.reward_files import (  # noqa: F401  fixtures
    LOADED,
    TEXT_SIZES,
    VISION,
    WORDS,
    aesthetic_files,
    clip_files,
    files,
    imagereward_files,
    noise,
    transformers_files,
)

PROMPTS = ["a red cat", "Dogs on the MOON, a cat.", "a " * 60]

SIZES = [(16, 16), (40, 40), (48, 80), (90, 31), (20, 12)]


class BlipReference:
    """ImageReward's forward pass from its checkpoint alone: BLIP's vit.py and med.py, line by line."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + (1.0 - mask[:, None, None, :]) * -10000.0
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def vision(self, pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        patches = F.conv2d(
            pixels, self.weights[f"{name}.patch_embed.proj.weight"], self.weights[f"{name}.patch_embed.proj.bias"], 16
        )
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.weights[f"{name}.cls_token"].expand(len(x), -1, -1), x], 1)
        x = x + self.weights[f"{name}.pos_embed"]
        for layer in range(2):
            block = f"{name}.blocks.{layer}"
            query, key, value = self.linear(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
            x = x + self.linear(self.attend(query, key, value, VISION["num_heads"]), f"{block}.attn.proj")
            hidden = F.gelu(self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
            x = x + self.linear(hidden, f"{block}.mlp.fc2")
        return self.norm(x, f"{name}.norm", 1e-6)

    def text(self, tokens: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        name = "blip.text_encoder"
        x = self.weights[f"{name}.embeddings.word_embeddings.weight"][tokens]
        x = x + self.weights[f"{name}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
        x = self.norm(x, f"{name}.embeddings.LayerNorm", 1e-12)
        for layer in range(2):
            block = f"{name}.encoder.layer.{layer}"
            for kind, source, hidden_places in (("attention", None, mask), ("crossattention", seen, None)):
                source = x if source is None else source
                part = f"{block}.{kind}.self"
                query, key, value = (
                    self.linear(x, f"{part}.query"),
                    *(self.linear(source, f"{part}.{each}") for each in ("key", "value")),
                )
                mixed = self.attend(query, key, value, TEXT_SIZES["num_attention_heads"], hidden_places)
                mixed = self.linear(mixed, f"{block}.{kind}.output.dense")
                x = self.norm(mixed + x, f"{block}.{kind}.output.LayerNorm", 1e-12)
            hidden = self.linear(F.gelu(self.linear(x, f"{block}.intermediate.dense")), f"{block}.output.dense")
            x = self.norm(hidden + x, f"{block}.output.LayerNorm", 1e-12)
        return x

    def head(self, x: Tensor) -> Tensor:
        for place in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{place}")
        return x[:, 0]


def test_clip_scores_are_open_clips(clip_files: dict[str, Any]) -> None:
    open_clip.add_model_config(clip_files["architecture"])
    network, _, transform = open_clip.create_model_and_transforms(
        "tiny-dfn", pretrained=clip_files["checkpoint"], image_resize_mode="squash"
    )
    images = noise(3, 48, 80)
    with torch.no_grad():
        pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
        image_features, text_features, _ = network.eval()(pixels, open_clip.get_tokenizer("tiny-dfn")(PROMPTS))
    expected = (image_features * text_features).sum(1).numpy()
    scores = build_reward("clip", **clip_files).score(images, PROMPTS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    safetensors = str(Path(clip_files["checkpoint"]).with_name("model.safetensors"))
    np.testing.assert_array_equal(
        build_reward("clip", **clip_files | {"checkpoint": safetensors}).score(images, PROMPTS), scores
    )
    other = build_reward("clip", **clip_files, resize="shortest").score(images, PROMPTS)
    assert np.abs(other - scores).max() > 1e-3


@pytest.mark.parametrize("mode", ["squash", "shortest"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_preprocessing_is_open_clips(height: int, width: int, mode: str) -> None:
    image = noise(1, height, width)
    expected: Any = open_clip.image_transform(16, is_train=False, resize_mode=mode)
    torch.testing.assert_close(
        clip_pixels(image, 16, mode == "squash")[0], expected(Image.fromarray(image[0])), atol=1e-6, rtol=0
    )


def test_clip_defaults_are_open_clips_entry_for_dfn5b() -> None:
    entry: Any = open_clip.get_pretrained_cfg("ViT-H-14-quickgelu", "dfn5b")
    assert entry["hf_hub"] == "apple/DFN5B-CLIP-ViT-H-14/"
    assert (entry["resize_mode"], entry["interpolation"], entry["quick_gelu"]) == ("squash", "bicubic", True)
    assert (entry["mean"], entry["std"]) == (CLIP_MEAN, CLIP_STD)
    shape = load_architecture("ViT-H-14-quickgelu")
    assert (shape["quick_gelu"], shape["embed_dim"], shape["vision_cfg"]["image_size"]) == (True, 1024, 224)


def test_pickscore_is_the_cosine_of_transformers_own_clip(transformers_files: dict[str, Any]) -> None:
    images = noise(3, 48, 80)
    network = CLIPModel.from_pretrained(transformers_files["model"]).eval()
    processor: Any = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(transformers_files["processor"]),
        CLIPTokenizer.from_pretrained(transformers_files["processor"]),
    )
    pictures = [Image.fromarray(image) for image in images]
    inputs = processor(text=PROMPTS, images=pictures, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits, factor = network(**inputs).logits_per_image.diagonal(), network.logit_scale.exp()
    scores = build_reward("pickscore", **transformers_files).score(images, PROMPTS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, (logits / factor).numpy(), atol=1e-5)
    scaled = build_reward("pickscore", **transformers_files, scale="logits").score(images, PROMPTS)
    np.testing.assert_allclose(scaled, logits.numpy(), atol=1e-3)  # about 100 times as large


@pytest.mark.parametrize(("kind", "divisor"), [("pickscore", 26), ("clip", 30)])
def test_other_scales_are_the_networks_logits_and_flow_grpos_share_of_them(
    kind: str, divisor: int, files: Callable[[str], dict[str, Any]]
) -> None:
    images, options = noise(3, 48, 80), files(kind)
    if kind == "pickscore":
        factor = CLIPModel.from_pretrained(options["model"]).logit_scale.exp().item()
    else:
        factor = torch.load(options["checkpoint"], weights_only=True)["logit_scale"].exp().item()
    assert factor != pytest.approx(1, abs=0.1)
    cosine, logits, flow_grpo = (
        build_reward(kind, **options, scale=scale).score(images, PROMPTS) for scale in ("cosine", "logits", "flow_grpo")
    )
    np.testing.assert_array_equal(cosine, build_reward(kind, **options).score(images, PROMPTS))
    np.testing.assert_allclose(logits, cosine * factor, rtol=1e-5)
    np.testing.assert_allclose(flow_grpo, cosine * factor / divisor, rtol=1e-5)
    assert flow_grpo.dtype == np.float32


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_shared_preprocessing_is_clip_image_processors(height: int, width: int) -> None:
    image = noise(1, height, width)
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = processor(Image.fromarray(image[0]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(clip_pixels(image, 16), expected, atol=1e-5, rtol=0)


def test_aesthetic_is_the_authors_head_on_normalised_features(aesthetic_files: dict[str, Any]) -> None:
    images = noise(3, 48, 80)
    network = CLIPModel.from_pretrained(aesthetic_files["backbone"]).eval()
    weights = torch.load(aesthetic_files["checkpoint"], weights_only=True)
    with torch.no_grad():
        features = network.get_image_features(pixel_values=clip_pixels(images, 16)).pooler_output
        features = features / features.norm(dim=-1, keepdim=True)
        for place in (0, 2, 4, 6, 7):
            features = features @ weights[f"layers.{place}.weight"].T + weights[f"layers.{place}.bias"]
    scores = build_reward("aesthetic", **aesthetic_files).score(images, PROMPTS)
    assert np.ptp(scores) > 1e-3
    np.testing.assert_allclose(scores, features[:, 0].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_imagereward_preprocessing_is_its_authors(height: int, width: int) -> None:
    image = noise(1, height, width)
    steps = [
        Resize(16, interpolation=InterpolationMode.BICUBIC),
        CenterCrop(16),
        lambda picture: picture.convert("RGB"),
    ]
    transform = Compose([*steps, ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)])
    torch.testing.assert_close(clip_pixels(image, 16)[0], transform(Image.fromarray(image[0])), atol=1e-6, rtol=0)


def test_imagereward_tokens_are_berts_with_two_more(imagereward_files: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(imagereward_files["vocabulary"], len(WORDS) + 2)
    reference = BertTokenizer(imagereward_files["vocabulary"])
    reference.add_special_tokens({"bos_token": "[DEC]"})
    reference.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    prompts = [*PROMPTS, "", "a [ENC] cat", "Çats, dögs"]
    expected = reference(prompts, padding="max_length", truncation=True, max_length=35)
    encodings = tokenizer.encode_batch(prompts)
    assert [encoding.ids for encoding in encodings] == expected["input_ids"]
    assert [encoding.attention_mask for encoding in encodings] == expected["attention_mask"]
    assert tokenizer.token_to_id("[ENC]") == len(WORDS) + 1


def test_imagereward_scores_are_the_authors_network(imagereward_files: dict[str, Any]) -> None:
    images = noise(3, 48, 80)
    reference = BlipReference(torch.load(imagereward_files["checkpoint"], weights_only=True))
    encodings = load_tokenizer(imagereward_files["vocabulary"], len(WORDS) + 2).encode_batch(PROMPTS)
    tokens = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.float32)
    state = reference.text(tokens, mask, reference.vision(clip_pixels(images, 32)))
    expected = (reference.head(state[:, 0]) - MEAN) / STD
    scores = build_reward("imagereward", **imagereward_files).score(images, PROMPTS)
    assert np.ptp(scores) > 1e-2
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_imagereward_default_has_the_published_shapes() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Network(ARCHITECTURE).state_dict().items()}
    expected = {
        "blip.visual_encoder.pos_embed": (1, 197, 1024),
        "blip.visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
        "blip.visual_encoder.blocks.23.attn.qkv.weight": (3072, 1024),
        "blip.text_encoder.embeddings.word_embeddings.weight": (30524, 768),
        "blip.text_encoder.encoder.layer.11.crossattention.self.key.weight": (768, 1024),
        "mlp.layers.0.weight": (1024, 768),
        "mlp.layers.7.bias": (1,),
    }
    assert {key: shapes[key] for key in expected} == expected
    assert len(shapes) == 4 + 24 * 12 + 2 + 4 + 12 * 26 + 10
    assert ARCHITECTURE["vision"]["num_heads"] == 16  # heads leave no trace in shapes
    assert ARCHITECTURE["text"]["num_attention_heads"] == 12


def test_jpeg_rewards_are_the_file_size_in_kilobytes_of_ddpo() -> None:
    images = np.concatenate([noise(1, 64, 48), np.full((1, 64, 48, 3), 90, np.uint8)])
    expected = []
    for image in images:
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        expected.append(buffer.tell() / 1000)
    large = build_reward("jpeg_incompressibility").score(images, ["", ""])
    np.testing.assert_allclose(large, expected, rtol=1e-6)
    np.testing.assert_array_equal(build_reward("jpeg_compressibility").score(images, ["", ""]), -large)
    assert large[0] > large[1]


@pytest.mark.parametrize("kind", LOADED)
def test_score_in_a_batch_is_the_score_alone_and_half_precision_is_near(
    kind: str, files: Callable[[str], dict[str, Any]]
) -> None:
    images, reward = noise(3, 20, 30), build_reward(kind, **files(kind))
    together = reward.score(images, PROMPTS)
    apart = [reward.score(images[k : k + 1], PROMPTS[k : k + 1])[0] for k in range(3)]
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)
    half = build_reward(kind, **files(kind), dtype="bfloat16").score(images, PROMPTS)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, together, atol=0.1 * float(1 + np.abs(together).max()))


@pytest.mark.parametrize("kind", [*LOADED, "jpeg_compressibility"])
def test_wrong_pictures_are_refused_by_the_rewards_name(kind: str, files: Callable[[str], dict[str, Any]]) -> None:
    reward = build_reward(kind, **(files(kind) if kind in LOADED else {}))
    good = noise(2, 16, 16)
    wrong: list[Any] = [good.astype(np.float32), good[0], good[..., :1], good.transpose(0, 3, 1, 2), list(good)]
    for images in wrong:
        with pytest.raises(ValueError, match=rf"^reward {kind}: images are .*expected a numpy array uint8"):
            reward.score(images, ["", ""])
    with pytest.raises(ValueError, match=rf"^reward {kind}: 1 prompts for 2 images"):
        reward.score(good, [""])


WRONG_OPTIONS: list[tuple[str, str, str, str]] = [
    ("clip", "checkpoint", "/none/model.bin", "no file '/none/model.bin'"),
    ("clip", "checkpoint", __file__, r"cannot read .*test_reward_models.py"),
    ("clip", "architecture", "ViT-Z", "cannot read ViT-Z as JSON"),
    ("clip", "resize", "longest", "'longest' given; allowed are squash, shortest"),
    ("clip", "scale", "100", "'100' given; allowed are cosine, logits, flow_grpo"),
    ("pickscore", "scale", "raw", "'raw' given; allowed are cosine, logits, flow_grpo"),
    ("clip", "device", "tpu:0", "device: 'tpu:0' cannot be used"),
    ("pickscore", "model", "/none", "no directory '/none'"),
    ("pickscore", "model", str(Path(__file__).parent), "CLIPModel cannot load"),
    ("pickscore", "processor", str(Path(__file__).parent), "CLIPImageProcessorPil cannot load"),
    ("pickscore", "dtype", "int8", "'int8' given; allowed are float32"),
    ("imagereward", "vocabulary", "/none/vocab.txt", "no file '/none/vocab.txt'"),
    ("imagereward", "vocabulary", __file__, "is not BERT's vocabulary"),
    ("imagereward", "architecture", __file__, "as JSON"),
    ("imagereward", "checkpoint", "/none.pt", "no file '/none.pt'"),
    ("aesthetic", "backbone", "/none", "no directory '/none'"),
    ("aesthetic", "checkpoint", __file__, "cannot read"),
]


@pytest.mark.parametrize(("kind", "option", "value", "expected"), WRONG_OPTIONS)
def test_wrong_option_is_named_in_one_line(
    kind: str, option: str, value: str, expected: str, files: Callable[[str], dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        build_reward(kind, **files(kind) | {option: value})
    assert str(caught.value).startswith(f"{option}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["clip", "imagereward", "aesthetic"])
@pytest.mark.parametrize("broken", ["key_missing", "key_added", "shape", "a list"])
def test_checkpoint_that_does_not_fit_is_refused(
    kind: str, broken: str, files: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    content = torch.load(files(kind)["checkpoint"], weights_only=True)
    name = next(key for key in reversed(content) if key.endswith("weight"))
    if broken == "key_missing":
        del content[name]
    elif broken == "key_added":
        content["extra.weight"] = torch.zeros(1)
    elif broken == "shape":
        content[name] = torch.zeros(3, 3)
    torch.save([content] if broken == "a list" else content, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"^checkpoint: .*broken\.pt (does not fit|does not contain)") as caught:
        build_reward(kind, **files(kind) | {"checkpoint": str(tmp_path / "broken.pt")})
    assert "\n" not in str(caught.value)


def test_model_folder_without_a_weight_is_refused(transformers_files: dict[str, Any], tmp_path: Path) -> None:
    network = CLIPModel.from_pretrained(transformers_files["model"])
    weights = network.state_dict()
    del weights["visual_projection.weight"]
    network.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"^model: .* is not a complete CLIPModel; .*visual_projection"):
        build_reward("pickscore", **transformers_files | {"model": str(tmp_path)})


def test_vocabulary_of_another_size_is_refused(imagereward_files: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]))
    with pytest.raises(ValueError, match=r"^vocabulary: .* has 16 tokens with \[DEC\] and \[ENC\], the network 17"):
        build_reward("imagereward", **imagereward_files | {"vocabulary": str(tmp_path / "vocab.txt")})


def raising_factory() -> None:
    raise KeyError("weights\nof mine")


def factory_of_nothing() -> object:
    return object()


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("raising_factory", "its factory raised KeyError: 'weights"),
        ("factory_of_nothing", r"its factory returned object, without score\(images, prompts\)"),
    ],
)
def test_factory_that_gives_no_reward_is_named(factory: str, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^reward {__name__}:{factory}: {expected}") as caught:
        build_reward(f"{__name__}:{factory}")
    assert "\n" not in str(caught.value)


def test_options_before_the_start_are_those_of_the_factories() -> None:
    import inspect
    from importlib import import_module

    for kind, place in KINDS.items():
        module, _, name = place.partition(":")
        parameters = inspect.signature(getattr(import_module(module), name)).parameters
        assert option_defaults(kind) == {
            option: REQUIRED if parameter.default is parameter.empty else parameter.default
            for option, parameter in parameters.items()
            if option != "device"  # that of the section
        }
        assert has_device(kind) == ("device" in parameters)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("taste", {}, "rewards.x.kind: 'taste' given; allowed are hpsv2"),
        ("clip", {"weights": "x"}, "rewards.x.options.weights: not an option of clip; allowed are checkpoint, arch"),
        ("jpeg_compressibility", {"quality": 1}, "rewards.x.options.quality: .*allowed are none"),
        ("unified_reward", {}, "rewards.x.options.base_urls: missing; unified_reward needs it"),
        ("clip", {"checkpoint": "none.pt"}, "rewards.x.options.checkpoint: no file none.pt"),
        ("imagereward", {"vocabulary": "/none:b"}, "rewards.x.options.vocabulary: no file"),
        ("pickscore", {"processor": "./none"}, "rewards.x.options.processor: no directory"),
        ("hpsv2", {"architecture": "none.json"}, "rewards.x.options.architecture: no file"),
        ("hpsv2", {"checkpoint": "embedded:none.pt"}, "rewards.x.options.checkpoint: no file"),
    ],
)
def test_what_is_wrong_is_told_before_the_start(kind: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_reward("rewards.x", RewardConfig(kind=kind, options=options, resources={"CPU": 1}))


def test_hub_names_are_told_and_files_are_passed(clip_files: dict[str, Any]) -> None:
    assert check_reward("rewards.x", RewardConfig(kind="clip", options=clip_files)) == []
    assert check_reward("rewards.x", RewardConfig(kind="my_module:mine", options={"anything": 1})) == []
    options = {"checkpoint": "a/b:c.pth", "backbone": "openai/clip-vit-large-patch14"}
    lines = check_reward("rewards.x", RewardConfig(kind="aesthetic", options=options))
    assert [line.partition(": ")[0] for line in lines] == ["rewards.x.options.checkpoint", "rewards.x.options.backbone"]


def test_checking_rewards_loads_no_model_code() -> None:
    program = (
        "import sys; from g2rpo_ray.config import RewardConfig; from g2rpo_ray.rewards import KINDS, check_reward\n"
        "from g2rpo_ray.rewards.options import REQUIRED, option_defaults\n"
        "for kind in KINDS:\n"
        "    defaults = option_defaults(kind)\n"
        "    options = {name: 'http://h' for name in defaults if defaults[name] is REQUIRED}\n"
        "    check_reward('x', RewardConfig(kind=kind, options=options, resources={'CPU': 1}))\n"
        "heavy = {'torch', 'torchvision', 'open_clip', 'hpsv2', 'transformers', 'huggingface_hub', 'ray'}\n"
        "print(heavy & set(sys.modules) or 'none')"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "none"


DOCUMENT = Path(__file__).parents[2] / "docs" / "rewards.md"


def test_ten_line_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOCUMENT.read_text()
    example = text.split("```python\n# my_reward.py\n")[1].split("```")[0]
    assert len(example.strip().splitlines()) <= 10
    (tmp_path / "my_reward.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[1] = 255
    scores = build_reward("my_reward:build", target=255.0).score(images, ["night", "day"])
    assert scores.dtype == np.float32
    assert scores.tolist() == [-1.0, 0.0]


def test_documentation_lists_every_kind_with_every_option() -> None:
    text = DOCUMENT.read_text()
    for kind in KINDS:
        row = next(line for line in text.splitlines() if line.startswith("|") and f"`{kind}`" in line.split("|")[1])
        for option in option_defaults(kind):
            assert f"`{option}`" in row, f"{kind}: {option}"

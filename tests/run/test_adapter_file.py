"""Adapters of other programs: each format has the effect that its own alpha says, or is refused in a line."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from g2rpo_ray.config import LoraConfig, ModelConfig, load_config
from g2rpo_ray.evaluation.adapters import read_adapters
from g2rpo_ray.models import FlowModel, add_lora, export_lora, load_lora, read_lora
from g2rpo_ray.types import FloatArray
from tests.support.tiny_flux import write_tiny_flux

RANK = 2

CONFIG = LoraConfig(rank=RANK, alpha=16)  # of the run; no adapter here has this alpha

FILE = "pytorch_lora_weights.safetensors"

METADATA = "lora_adapter_metadata"


def matrices(layers: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """A random LoRA: {"<layer>.A" [RANK, 4], "<layer>.B" [rows, RANK]}."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{layer}.A": (RANK, 4) for layer in layers} | {f"{layer}.B": (n, RANK) for layer, n in layers.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def named(lora: Mapping[str, Tensor], prefix: str, down: str = "lora_A", up: str = "lora_B") -> dict[str, Tensor]:
    ends = {"A": down, "B": up}
    return {f"{prefix}{name[:-2]}.{ends[name[-1]]}.weight": tensor for name, tensor in lora.items()}


def effect(state: Mapping[str, FloatArray], config: LoraConfig = CONFIG) -> dict[str, FloatArray]:
    """What a LoRA adds to the weights of each layer."""
    layers = {name.split(".lora_")[0] for name in state}
    factor = config.alpha / config.rank
    return {n: factor * state[f"{n}.lora_B.weight"] @ state[f"{n}.lora_A.weight"] for n in layers}


def same_effect(found: Mapping[str, FloatArray], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for layer, matrix in expected.items():
        np.testing.assert_allclose(found[layer], np.asarray(matrix), rtol=1e-5, atol=1e-6, err_msg=layer)


def products(lora: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    return {name[:-2]: alpha / RANK * lora[f"{name[:-2]}.B"] @ lora[name] for name in lora if name.endswith(".A")}


LAYERS = {"blocks.0.attn.to_q": 4, "blocks.1.attn.to_out.0": 6}


def stored(**settings: Any) -> dict[str, str]:
    return {METADATA: json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


@pytest.mark.parametrize("alpha", [3, 2, 0.5])
def test_alpha_is_the_adapters_own(alpha: float, tmp_path: Path) -> None:
    """In diffusers' metadata, in a tensor beside each layer, in the metadata of a transformer alone; or the rank."""
    lora = matrices(LAYERS)
    named_layers = named(lora, "transformer.")
    alphas = {f"transformer.{layer}.alpha": torch.tensor(alpha) for layer in LAYERS}
    written: list[tuple[dict[str, Tensor], dict[str, str] | None, float]] = [
        (named_layers, stored(r=RANK, lora_alpha=alpha), alpha),
        (named_layers | alphas, None, alpha),
        (named(lora, ""), {METADATA: json.dumps({"r": RANK, "lora_alpha": alpha})}, alpha),
        (named_layers, None, RANK),
        (named_layers, {"format": "pt"}, RANK),
    ]
    for number, (tensors, metadata, own) in enumerate(written):
        save_file(tensors, tmp_path / f"{number}.safetensors", metadata)
        same_effect(effect(read_lora(tmp_path / f"{number}.safetensors", CONFIG)), products(lora, own))


@pytest.mark.parametrize("alpha", [64, 3, 2])
def test_exports_of_before_and_now_are_read_alike_and_have_alpha_equal_to_the_rank(alpha: int, tmp_path: Path) -> None:
    lora, config = matrices(LAYERS), LoraConfig(rank=RANK, alpha=alpha)
    state = {name: tensor.numpy() for name, tensor in named(lora, "").items()}
    export_lora(tmp_path / "new", state, config, diffusers.FluxPipeline)
    (tmp_path / "old").mkdir()
    save_file(named(lora, "transformer."), tmp_path / "old" / FILE, stored(r=RANK, lora_alpha=alpha))
    plain = {name.removeprefix("transformer."): t.numpy() for name, t in load_file(tmp_path / "new" / FILE).items()}
    same_effect(effect(plain, LoraConfig(rank=RANK, alpha=RANK)), products(lora, alpha))  # without any metadata
    for folder in ("old", "new"):
        for name, array in read_lora(tmp_path / folder, config).items():
            np.testing.assert_allclose(array, state[name], rtol=1e-7 if alpha == 3 else 0)  # else a power of two
        same_effect(effect(read_lora(tmp_path / folder, CONFIG)), products(lora, alpha))


@torch.no_grad()
def test_a_peft_folder_has_the_effect_that_peft_gives_it(tmp_path: Path) -> None:
    """And `evaluate` and the demo read it so, whatever `lora.alpha` is."""
    path = write_tiny_flux(tmp_path / "tiny")
    config = ModelConfig(path=str(path), dtype="float32", height=16, width=16, max_sequence_length=12)
    theirs, ours = (FlowModel.load(config, "cpu", transformer=True) for _ in range(2))
    settings = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["to_q", "to_k"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(theirs.transformer, settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / FILE).exists()

    lora = LoraConfig(rank=RANK, alpha=16, targets=("to_q", "to_k"))
    add_lora(ours.transformer, lora, seed=0)
    x, sigma = ours.initial_noise(torch.Generator().manual_seed(1))[None], torch.tensor([0.7])
    conditioning = ours.condition([ours.random_embedding("", torch.Generator().manual_seed(2))])
    base = ours.velocity(x, sigma, conditioning)
    load_lora(ours.transformer, read_lora(tmp_path / "adapter", lora, ours.pipeline_class))
    expected = theirs.velocity(x, sigma, conditioning)
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(ours.velocity(x, sigma, conditioning), expected, rtol=1e-4, atol=1e-5)

    run = load_config(None, ["model.path=x"]).model_copy(update={"model": config, "lora": lora})
    (_, read) = read_adapters([f"mine={tmp_path / 'adapter'}"], run)
    load_lora(ours.transformer, read.state)
    torch.testing.assert_close(ours.velocity(x, sigma, conditioning), expected, rtol=1e-4, atol=1e-5)


def kohya(lora: Mapping[str, Tensor], alpha: float = 1.0) -> dict[str, Tensor]:
    """As sd-scripts writes: half precision, an alpha a layer."""
    flat = {f"{name[:-2].replace('.', '_')}{name[-2:]}": tensor.half() for name, tensor in lora.items()}
    alphas = {f"lora_unet_{name[:-2]}.alpha": torch.tensor(alpha).half() for name in flat}
    return named(flat, "lora_unet_", "lora_down", "lora_up") | alphas


def split(
    layers: Mapping[str, tuple[str, ...]], rows: Mapping[str, tuple[int, ...]] | None = None
) -> Callable[..., Any]:
    """How fused layers of the original code are those of diffusers: by rows, or in equal parts."""

    def expected(lora: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, matrix in products(lora, alpha).items():
            parts = layers[name]
            sizes = (rows or {}).get(name) or len(matrix) // len(parts)
            found |= dict(zip(parts, matrix.split(sizes), strict=True))
        return found

    return expected


def attention(block: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{block}.attn.{name}" for name in names)


FLUX = {
    "double_blocks.0.img_attn.qkv": attention("transformer_blocks.0", "to_q", "to_k", "to_v"),
    "double_blocks.0.txt_attn.proj": attention("transformer_blocks.0", "to_add_out"),
    "single_blocks.0.linear1": (*attention("single_transformer_blocks.0", "to_q", "to_k", "to_v"),
                                "single_transformer_blocks.0.proj_mlp"),
}  # fmt: skip

FLUX_ROWS = {"double_blocks.0.img_attn.qkv": 6, "double_blocks.0.txt_attn.proj": 4, "single_blocks.0.linear1": 21504}

FLUX2 = {
    "double_blocks.0.img_attn.qkv": attention("transformer_blocks.0", "to_q", "to_k", "to_v"),
    "double_blocks.0.txt_attn.proj": attention("transformer_blocks.0", "to_add_out"),
    "single_blocks.0.linear1": attention("single_transformer_blocks.0", "to_qkv_mlp_proj"),
}

FLUX2_ROWS = {"double_blocks.0.img_attn.qkv": 6, "double_blocks.0.txt_attn.proj": 4, "single_blocks.0.linear1": 4}

LUMINA = {
    f"layers.0.{name}": parts
    for name, parts in {
        "attention.qkv": attention("layers.0", "to_q", "to_k", "to_v"),
        "attention.out": attention("layers.0", "to_out.0"),
        "adaLN_modulation.1": ("layers.0.norm1.linear",),
        **{f"feed_forward.w{n}": (f"layers.0.feed_forward.linear_{n}",) for n in (1, 2, 3)},
    }.items()
}

LUMINA_ROWS = {name: 2304 + 2 * 768 if name.endswith("qkv") else 4 for name in LUMINA}

QWEN = {"transformer_blocks.0.attn.to_q": 4, "transformer_blocks.0.attn.add_k_proj": 4}

Z_IMAGE = {"layers.0.attention.to_q": 4, "noise_refiner.0.attention.to_out.0": 4}

flux = split(FLUX, {"single_blocks.0.linear1": (3072, 3072, 3072, 12288)})

lumina = split(LUMINA, {"layers.0.attention.qkv": (2304, 768, 768)})

PROGRAMS: dict[str, tuple[str, Mapping[str, int], bool, Callable[..., Any]]] = {
    "kohya, FLUX.1": ("FluxPipeline", FLUX_ROWS, True, flux),
    "kohya, Chroma": ("ChromaPipeline", FLUX_ROWS, True, flux),
    "kohya, FLUX.2": ("Flux2Pipeline", FLUX2_ROWS, True, split(FLUX2)),
    "kohya, FLUX.2 klein": ("Flux2KleinPipeline", FLUX2_ROWS, True, split(FLUX2)),
    "kohya, Qwen-Image": ("QwenImagePipeline", QWEN, True, products),
    "kohya, Z-Image": ("ZImagePipeline", Z_IMAGE, True, products),
    "ai-toolkit, Chroma": ("ChromaPipeline", FLUX_ROWS, False, flux),
    "ai-toolkit, FLUX.2": ("Flux2Pipeline", FLUX2_ROWS, False, split(FLUX2)),
    "ai-toolkit, FLUX.2 klein": ("Flux2KleinPipeline", FLUX2_ROWS, False, split(FLUX2)),
    "ai-toolkit, Qwen-Image": ("QwenImagePipeline", QWEN, False, products),
    "ai-toolkit, Z-Image": ("ZImagePipeline", Z_IMAGE, False, products),
    "ai-toolkit, Lumina": ("Lumina2Pipeline", LUMINA_ROWS, False, lumina),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_other_programs_files_are_converted_by_diffusers(program: str, tmp_path: Path) -> None:
    kind, layers, is_kohya, expected = PROGRAMS[program]
    lora = {name: tensor.half().float() for name, tensor in matrices(layers).items()}
    tensors = kohya(lora) if is_kohya else named(lora, "diffusion_model.")
    save_file(tensors, tmp_path / "adapter.safetensors")
    found = effect(read_lora(tmp_path / "adapter.safetensors", CONFIG, getattr(diffusers, kind)))
    same_effect(found, expected(lora, 1.0 if is_kohya else RANK))


def damaged(part: str, value: Any) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        name = f"transformer.blocks.0.attn.to_q.{part}"
        tensors[name] = value(tensors.get(name)) if callable(value) else value

    return damage


def raw(text: str) -> dict[str, str]:
    return {METADATA: text}


REFUSED: dict[str, tuple[Any, dict[str, str] | None, list[str]]] = {
    "alpha by layer": (None, stored(lora_alpha=2, alpha_pattern={"to_q": 1}), ["alpha_pattern={'to_q': 1}"]),
    "rsLoRA": (None, stored(lora_alpha=2, use_rslora=True), ["use_rslora=True"]),
    "DoRA": (damaged("lora_magnitude_vector", torch.ones(4)), None, ["lora_magnitude_vector"]),
    "kohya's DoRA": (damaged("dora_scale", torch.ones(4)), None, ["dora_scale"]),
    "LoKr": (damaged("lokr_w1", torch.ones(4, 4)), None, ["lokr_w1"]),
    "a bias": (damaged("lora_B.bias", torch.ones(4)), None, ["lora_B.bias"]),
    "another base": (None, stored(init_lora_weights="pissa_niter_4"), ["init_lora_weights=pissa_niter_4", "base"]),
    "another method": (None, stored(peft_type="LOHA"), ["peft_type=LOHA"]),
    "integers": (damaged("lora_A.weight", lambda t: t.to(torch.int8)), None, ["to_q.lora_A.weight is int8 [2, 4]"]),
    "NaN": (damaged("lora_B.weight", lambda t: t * torch.nan), None, ["to_q.lora_B.weight has values", "not finite"]),
    "infinity": (damaged("lora_A.weight", lambda t: t / 0), None, ["to_q.lora_A.weight has values", "not finite"]),
    "beyond float32": (damaged("lora_A.weight", lambda t: t.double() * 1e300), None, ["lora_A.weight", "not finite"]),
    "alpha beyond float32": (None, stored(lora_alpha=1e300), ["lora_B.weight times its alpha is not finite"]),
    "a convolution": (damaged("lora_A.weight", lambda t: t[..., None, None]), None, ["float32 [2, 4, 1, 1]"]),
    "half a layer": (damaged("lora_A.weight", None), None, ["lacks blocks.0.attn.to_q.lora_A.weight"]),
    "another rank": (damaged("lora_A.weight", lambda t: t[:1]), None, ["has rank 1", "to_q", "lora.rank is 2"]),
    "a text encoder": (lambda t: t.update({"text_encoder.q.lora_A.weight": torch.ones(2, 4)}), None, ["text_encoder."]),
    "two namings": (lambda t: t.update({"diffusion_model.q.lora_A.weight": torch.ones(2, 4)}), None, ["two ways"]),
    "nothing": (lambda t: t.clear(), None, ["is empty"]),
    "alpha is null": (None, stored(lora_alpha=None), ["lora_alpha is None; must be a positive number"]),
    "alpha is text": (None, stored(lora_alpha="2"), ["lora_alpha is '2'"]),
    "alpha is 0": (None, stored(lora_alpha=0), ["lora_alpha is 0;"]),
    "alpha is not a number": (damaged("alpha", torch.tensor(torch.nan)), None, ["to_q.alpha is nan"]),
    "metadata is null": (None, raw("null"), [f"metadata {METADATA} is 'null'; must be a JSON object"]),
    "metadata is a list": (None, raw("[1]"), ["is '[1]'; must be a JSON object"]),
    "metadata is text": (None, raw('"2"'), ["is '\"2\"'; must be"]),
    "metadata is a number": (None, raw("2"), ["is '2'; must be"]),
    "metadata is no JSON": (None, raw("{half"), ["is '{half'; must be"]),
    "metadata is too deep": (None, raw("[" * 100_000), ["must be a JSON object"]),
}


def refused(path: Path, pipeline: Any = None) -> str:
    with pytest.raises(ValueError, match=r"^LoRA ") as error:
        read_lora(path, CONFIG, pipeline)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", REFUSED)
def test_what_no_lora_can_represent_is_refused_by_name(case: str, tmp_path: Path) -> None:
    damage, metadata, parts = REFUSED[case]
    tensors: dict[str, Any] = named(matrices(LAYERS), "transformer.")
    if damage:
        damage(tensors)
    save_file(
        {name: t.contiguous() for name, t in tensors.items() if t is not None}, tmp_path / "a.safetensors", metadata
    )
    message = refused(tmp_path / "a.safetensors", diffusers.FluxPipeline)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("settings", [None, "null", "[]", "{half", {"use_rslora": True}, {"alpha_pattern": {"q": 1}}])
def test_a_peft_folder_without_usable_settings_is_refused(settings: Any, tmp_path: Path) -> None:
    save_file(named(matrices(LAYERS), "base_model.model."), tmp_path / "adapter_model.safetensors")
    if settings is not None:
        (tmp_path / "adapter_config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    message = refused(tmp_path)
    assert (min(settings) if isinstance(settings, dict) else "adapter_config.json") in message


def test_a_format_that_diffusers_does_not_know_for_the_family_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file(kohya(matrices(QWEN)), file)
    assert "diffusers does not convert such names for a StableDiffusion3Pipeline" in refused(
        file, diffusers.StableDiffusion3Pipeline
    )
    assert "contains lora_unet_transformer_blocks" in refused(file)  # of a model that is not here
    save_file(kohya(matrices({"single_blocks.0.linear1": 4})), file)  # of another size than FLUX.1
    assert "diffusers cannot convert it for a FluxPipeline (AssertionError" in refused(file, diffusers.FluxPipeline)
    save_file(kohya(matrices(FLUX2_ROWS | {"double_stream_modulation_img_lin": 4})), file)  # which diffusers leaves out
    message = refused(file, diffusers.Flux2Pipeline)
    assert "cannot convert all of it" in message
    assert "double_stream_modulation_img_lin" in message
    assert not capsys.readouterr().err  # the line is the caller's

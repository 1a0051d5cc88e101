"""Diffusers pipelines as flow models, and their LoRA. No Ray."""

from g2rpo_ray.models.adapter_file import check_adapter_file, export_lora, read_lora
from g2rpo_ray.models.base import Conditioning, FlowModel, describe_model
from g2rpo_ray.models.compiled import compile_blocks
from g2rpo_ray.models.conditioning import negatives
from g2rpo_ray.models.distance import LoraDistance
from g2rpo_ray.models.fold import fold_lora, lora_replaced
from g2rpo_ray.models.inference import one_prompt
from g2rpo_ray.models.lora import (
    WeightsMismatch,
    add_lora,
    check_lora,
    idle_modules,
    load_lora,
    lora_disabled,
    lora_parameters,
    lora_shapes,
    lora_state,
    manifest_of,
    verify,
)
from g2rpo_ray.models.quantized import quantize

__all__ = [
    "Conditioning",
    "FlowModel",
    "LoraDistance",
    "WeightsMismatch",
    "add_lora",
    "check_adapter_file",
    "check_lora",
    "compile_blocks",
    "describe_model",
    "export_lora",
    "fold_lora",
    "idle_modules",
    "load_lora",
    "lora_disabled",
    "lora_parameters",
    "lora_replaced",
    "lora_shapes",
    "lora_state",
    "manifest_of",
    "negatives",
    "one_prompt",
    "quantize",
    "read_lora",
    "verify",
]

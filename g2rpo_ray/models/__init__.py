"""Diffusers pipelines as flow models, and the LoRA that is trained on them. No Ray here."""

from g2rpo_ray.models.base import Conditioning, FlowModel
from g2rpo_ray.models.distance import LoraDistance
from g2rpo_ray.models.inference import fold_lora, one_prompt
from g2rpo_ray.models.lora import (
    WeightsMismatch,
    add_lora,
    check_lora,
    describe,
    export_lora,
    load_lora,
    lora_disabled,
    lora_parameters,
    lora_replaced,
    lora_shapes,
    lora_state,
    read_lora,
    verify,
)

__all__ = [
    "Conditioning",
    "FlowModel",
    "LoraDistance",
    "WeightsMismatch",
    "add_lora",
    "check_lora",
    "describe",
    "export_lora",
    "fold_lora",
    "load_lora",
    "lora_disabled",
    "lora_parameters",
    "lora_replaced",
    "lora_shapes",
    "lora_state",
    "one_prompt",
    "read_lora",
    "verify",
]

"""A small VideoAlign checkpoint in its real format: a LoRA that is not merged, under PEFT's names."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AddedToken, Qwen2VLForConditionalGeneration

from g2rpo_ray.rewards import build_reward
from tests.support.hpsv3_files import WIDTH, old_name, save_base

TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")


def adapted(config, tokenizer):
    """The network of the released code, with random weights, a head, and a LoRA on the text's linear layers."""
    torch.manual_seed(1)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    network = Qwen2VLForConditionalGeneration(config)
    network.resize_token_embeddings(len(tokenizer))
    network.rm_head = nn.Linear(WIDTH, 1, bias=False)
    linear = [
        name for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in ("visual", "lm_head", "rm_head"))
    ]  # fmt: skip
    network = get_peft_model(network, LoraConfig(target_modules=linear, r=64, lora_alpha=128)).eval()
    for name, value in network.named_parameters():
        if "norm" not in name:
            value.data.normal_(0, 0.02 if "lora" in name else 0.15)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`base`, the configuration and tokenizer of a small Qwen2-VL, and `model.pth` with random weights."""
    root = tmp_path_factory.mktemp("videoalign")
    network = adapted(*save_base(root / "base"))
    torch.save({released_name(name): value for name, value in network.state_dict().items()}, root / "model.pth")
    return root


def released_name(name):
    """PEFT's names around those that transformers had when VideoAlign was published."""
    prefix = "base_model.model."
    return prefix + old_name(name.removeprefix(prefix))


def built(folder, checkpoint="model.pth", **options):
    options = {"backbone": str(folder / "base"), "dtype": "float32", "part": "visual_quality"} | options
    return build_reward("videoalign", checkpoint=str(folder / checkpoint), **options)

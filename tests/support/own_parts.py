"""A kernel, an objective, a credit group and a family of one's own."""

import sys

import pytest

PROMPTS = ["a red circle", "a blue ring", "a green square", "a red ring"]


OWN = """
import math
import torch
from g2rpo_ray.models.flux import Model

def kernel(x, velocity, sigma, next_sigma, eta, first):
    delta = next_sigma - sigma
    mean = x + delta * velocity + (eta**2 / (2 * sigma)) * delta * (x + (1 - sigma) * velocity)
    return mean, eta * math.sqrt(-delta)

def still(x, velocity, sigma, next_sigma, eta, first):
    return x + (next_sigma - sigma) * velocity, eta * next_sigma

def objective(new_log_prob, old_log_prob, advantage, *, clip_range):
    ratio = (new_log_prob - old_log_prob).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))

def moving(new_log_prob, old_log_prob, advantage, drift):
    return drift - advantage * (new_log_prob - old_log_prob)

def group(tree):
    return tree.source

class Family(Model):
    lora_targets = ("attn.to_q",)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module outside of the package, with one of each kind of thing that a user may add."""
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return "mine"

"""Objectives of the forward process: against worked cases and by their properties."""

import json
from pathlib import Path

import pytest
import torch

from g2rpo_ray.algo.forward import awm_log_probs, nft_losses, renoised, velocity_shift
from g2rpo_ray.algo.objectives import edge_losses

CASES = json.loads((Path(__file__).parents[1] / "golden" / "forward.json").read_text())

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=[case["weighting"] for case in CASES])
def test_golden_case(case, dtype):
    def column(name):
        return torch.tensor([row[name] for row in case["rows"]], dtype=dtype)

    x0, noise, t, v, old = (column(name) for name in ("x0", "eps", "t", "v", "v_old"))
    advantage, clip = column("advantage"), case["advantage_clip"]
    x = renoised(x0, noise, t)
    nft = nft_losses(x0, x, t, v, old, advantage, beta=case["beta"], clip=clip)
    nft = nft + case["kl"] * velocity_shift(v, column("v_ref"))
    new, before = (
        awm_log_probs(case["weighting"], x0, noise, t, velocity, power=case["power"]) for velocity in (v, old)
    )
    awm = edge_losses("clip", new, before, advantage.clamp(-clip, clip), clip_range=case["ratio_clip"])
    for name, value in (("nft", nft), ("awm_log_prob", new), ("awm_old_log_prob", before), ("awm", awm)):
        torch.testing.assert_close(value, column(name), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=name)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_begins_as_flow_matching_times_the_advantage(beta):
    """At v = v_old the two halves differ by their weight alone, r and 1 − r, and β is in neither."""
    x0, noise, old = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, advantage = torch.tensor([0.1, 0.4, 0.7, 1.0]).double(), torch.tensor([-5.0, 0.0, 2.0, 9.0]).double()
    v, x = old.clone().requires_grad_(), renoised(x0, noise, t)
    nft_losses(x0, x, t, v, old, advantage, beta=beta, clip=5.0).sum().backward()
    wrong = old - (noise - x0)
    slope = 2 * t.view(-1, 1, 1) * wrong / wrong.abs().mean((1, 2), keepdim=True) / wrong[0].numel()
    torch.testing.assert_close(v.grad, advantage.clamp(-5, 5).view(-1, 1, 1) * slope)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="'t3' given; allowed are uniform, t, t2, huber, ghuber"):
        awm_log_probs("t3", *torch.ones(4, 1, 2))

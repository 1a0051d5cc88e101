"""Small runs of methods."""

SMALL = {
    "flow_grpo": {"roots": 3, "group_size": 1, "branch_steps": "[0]"},
    "mix_grpo": {"group_size": 3, "branch_steps": "[0]", "slide_every": 1},
    "branch_grpo": {"group_size": 2, "branch_steps": "[0]"},
    "diffusion_nft": {"roots": 3, "group_size": 1, "branch_steps": "[0]"},
    "awm": {"roots": 3, "group_size": 1, "branch_steps": "[0]"},
}


def settings_of(method: str) -> dict[str, object]:
    """Of a run of two iterations, in units of one child each."""
    settings = {f"sampler__{key}": value for key, value in SMALL[method].items()}
    if method == "flow_grpo":  # with a second reward, as released
        reward = {"kind": "jpeg_incompressibility", "weight": 0.5, "resources": "{}"}
        settings |= {"credit__normalise": "sum", **{f"rewards__size__{key}": value for key, value in reward.items()}}
    return settings | {
        "method": method, "iterations": 2, "learner__updates_per_rollout": 2, "rollout__members_per_unit": 1
    }  # fmt: skip

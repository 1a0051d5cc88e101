"""Rewards of every packaged configuration are tried, or the reason is told."""

import json
from pathlib import Path

from g2rpo_ray.commands.rewards import main
from g2rpo_ray.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_every_configuration_s_rewards_are_tried_or_told(capsys, monkeypatch):
    """Five of the files have all rewards of all of them; the hub is not to be reached."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def rewards(name):
        found = load_config(str(CONFIGS / f"{name}.yaml")).all_rewards.values()
        return {(reward.kind, json.dumps(reward.options, sort_keys=True)) for reward in found}

    names = [path.stem for path in CONFIGS.glob("*.yaml") if not load_config(str(path)).model.sources]
    every = set().union(*map(rewards, names))  # of edits, a server and the user's own pictures are needed
    some = ("quickstart", "flux_hps_clip", "sd3_awm", "wan21_g2rpo", "video_quickstart")
    assert set().union(*map(rewards, some)) == every
    on_cpu = [part for name in ("hpsv2", "clip") for part in ("--set", f"rewards.{name}.resources={{CPU: 1}}")]
    assert main(["flux_hps_clip", *on_cpu]) == 1
    hps, clip = capsys.readouterr().out.splitlines()
    assert "rewards.hpsv2: not tried: checkpoint: cannot download 'xswu/HPSv2:HPS_v2.1_compressed.pt'" in hps
    assert all("cannot download" in line and "give the path of a file" in line for line in (hps, clip))
    assert main(["sd3_awm"]) == 1
    (pickscore,) = capsys.readouterr().out.splitlines()
    assert "not tried: device: 'cuda' cannot be used" in pickscore or "not tried: model: " in pickscore
    assert main(["video_quickstart"]) == 1
    direction, thing = capsys.readouterr().out.splitlines()
    assert "none of the images has a prompt that motion_direction can score; give IMAGES" in direction
    assert "motion_thing" in thing
    small = [part for key in ("height", "width") for part in ("--set", f"model.{key}=64")]
    assert main(["wan21_g2rpo", *on_cpu[:2], *small]) == 1
    moved = capsys.readouterr().out
    assert "eval_rewards.dynamic_degree: dynamic_degree on no device" in moved
    assert "eval_rewards.temporal_consistency: temporal_consistency on no device" in moved

"""A small study."""

import sys
from pathlib import Path

import yaml

from g2rpo_ray.study.plan import Plan
from g2rpo_ray.study.schema import read_study

TREE = {"method": "g2rpo", "sampler": {"branch_steps": [0], "group_size": 2, "strides": [1]}}

STUDY = {
    "name": "tiny",
    "config": "quickstart",
    "set": {
        "sampler": {"steps": 4}, "lora": {"rank": 4}, "data": {"prompts_per_iteration": 2},
        "evaluation": {"seeds": 1, "grid_prompts": 2, "anchors": False}, "eval_rewards": {"colour": None},
    },
    "budget": 120,
    "looks": 2,
    "reach": [0.5],
    "early": 0.25,
    "tuning": {"seed": 9, "share": 0.5, "lr": [1e-4, 2e-4]},
    "tables": {
        "one": {
            "title": "One reward", "seeds": [0, 1], "against": ["base", "chains"],
            "variants": {
                "tree": TREE,
                "chains": {"method": "dance_grpo", "sampler": {"group_size": 2},
                           "learner": {"lr": 3e-4, "updates_per_rollout": 1}},
            },
        },
        "ablation": {
            "title": "Noise", "seeds": [0, 1], "tuned_as": "tree",
            "variants": {
                "eta .7": TREE,
            },
        },
    },
}  # fmt: skip


def study_file(folder: Path, **changes) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **changes}, allow_unicode=True, sort_keys=False))
    return file


def plan_of(folder: Path, **changes) -> Plan:
    return Plan(*read_study(str(study_file(folder, **changes))))


def command(file: Path, output: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "g2rpo_ray.commands.main",
        "study",
        str(file),
        "--output",
        str(output),
        "--jobs",
        "1",
        *more,
    ]


STOPPED = "stopped; finished runs are in the record, and the same command resumes"

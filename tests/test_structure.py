"""Who may import whom, proved in fresh processes; and that what is configured is documented."""

import subprocess
import sys

import pytest

HEAVY = ("ray", "deepspeed", "diffusers", "transformers", "peft")


def modules_after(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_algorithm_needs_torch_alone():
    loaded = modules_after("import g2rpo_ray.algo")
    assert not loaded & {*HEAVY, "pydantic", "yaml", "PIL"}


@pytest.mark.parametrize(
    "module",
    [
        "sampler",
        "models",
        "rewards",
        "data",
        "journal",
        "heldout",
        "checkpoint",
        "tracking",
        "preflight",
        "config",
        "evaluate",
        "adapters",
        "comparison",
        "scorebook",
        "storage",
        "timeline",
        "scale",
    ],
)
def test_only_the_shells_know_ray(module):
    assert "ray" not in modules_after(f"import g2rpo_ray.{module}")


def test_the_engine_knows_deepspeed_but_not_ray():
    loaded = modules_after("import os; os.environ['DS_ACCELERATOR'] = 'cpu'; import learner.engine")
    assert "deepspeed" in loaded
    assert "ray" not in loaded


def test_asking_for_help_loads_nothing_heavy():
    assert not modules_after("import g2rpo_ray.run") & {"ray", "deepspeed"}

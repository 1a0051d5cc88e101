"""Who may import whom, proved in fresh processes; and that what is configured is documented."""

import subprocess
import sys
from pathlib import Path

HEAVY = ("ray", "deepspeed", "diffusers", "transformers", "peft")


def modules_after(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_algorithm_needs_torch_alone():
    loaded = modules_after("import g2rpo_ray.algo")
    assert not loaded & {*HEAVY, "pydantic", "yaml", "PIL"}


SHELLS = ("run", "evaluate", "scale")  # they load Ray when there is something to run


def test_only_the_shells_know_ray():
    package = Path(__file__).parent.parent / "g2rpo_ray"
    modules = [path.relative_to(package.parent).with_suffix("") for path in package.rglob("*.py")]
    names = sorted(".".join(module.parts) for module in modules if module.name != "__init__")
    assert {f"g2rpo_ray.{shell}" for shell in SHELLS} < set(names)
    assert "ray" not in modules_after("import " + ", ".join(names))


def test_the_engine_knows_deepspeed_but_not_ray():
    loaded = modules_after("import os; os.environ['DS_ACCELERATOR'] = 'cpu'; import learner.engine")
    assert "deepspeed" in loaded
    assert "ray" not in loaded


def test_asking_for_help_loads_nothing_heavy():
    assert not modules_after("import g2rpo_ray.run") & {"ray", "deepspeed"}

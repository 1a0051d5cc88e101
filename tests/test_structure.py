"""Who may import whom, proved in fresh processes; and that what is configured is documented."""

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "g2rpo_ray"
HEAVY = ("ray", "deepspeed", "diffusers", "transformers", "peft")


def modules_after(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_algorithm_needs_torch_alone():
    loaded = modules_after("import g2rpo_ray.algo")
    assert not loaded & {*HEAVY, "pydantic", "yaml", "PIL"}


def test_a_method_is_data_and_needs_nothing():
    names = [path.stem for path in (PACKAGE / "methods").glob("[a-z]*.py")]
    assert "g2rpo" in names
    loaded = modules_after("import " + ", ".join(f"g2rpo_ray.methods.{name}" for name in names))
    assert not loaded & {*HEAVY, "torch", "numpy", "pydantic", "yaml"}


SHELLS = ("run", "evaluate", "scale")  # they load Ray when there is something to run


def test_only_the_shells_know_ray():
    """Nothing of g2rpo_ray loads it: what runs on Ray is in actors/."""
    modules = [path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")]
    names = sorted(".".join(module.parts) for module in modules if module.name != "__init__")
    assert {f"g2rpo_ray.{shell}" for shell in SHELLS} < set(names)
    assert "ray" not in modules_after("import " + ", ".join(names))
    assert "ray" in modules_after("import actors.session")  # what the loop calls: loaded when there is a cluster


def test_the_learner_knows_deepspeed_in_its_engine_alone_and_no_ray():
    loaded = modules_after("import os; os.environ['DS_ACCELERATOR'] = 'cpu'; import learner.engine")
    assert "deepspeed" in loaded
    assert "ray" not in loaded
    assert not modules_after("import learner.loss") & {"ray", "deepspeed"}
    assert not modules_after("import learner.batch") & set(HEAVY)  # the driver uses it, too
    assert "deepspeed" not in modules_after("import actors.learner")


def test_asking_for_help_loads_nothing_heavy():
    assert not modules_after("import g2rpo_ray.run") & {"ray", "deepspeed"}

"""What fresh processes load. Who may import whom is checked by import-linter: `make lint`."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "g2rpo_ray"

HEAVY = ("ray", "deepspeed", "diffusers", "transformers", "peft")


def modules_after(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_algorithm_needs_torch_alone_and_trees_not_even_that():
    names = [path.stem for path in (PACKAGE / "algo").glob("[a-z]*.py")]
    loaded = modules_after("import " + ", ".join(f"g2rpo_ray.algo.{name}" for name in names))
    assert "torch" in loaded
    assert not loaded & {*HEAVY, "pydantic", "yaml", "PIL"}
    assert "torch" not in modules_after(
        "import g2rpo_ray.algo.tree, g2rpo_ray.algo.completion, g2rpo_ray.algo.win_rate"
    )


def test_a_method_is_data_and_needs_nothing():
    names = [path.stem for path in (PACKAGE / "methods").glob("[a-z]*.py")]
    assert "g2rpo" in names
    loaded = modules_after("import " + ", ".join(f"g2rpo_ray.methods.{name}" for name in names))
    assert not loaded & {*HEAVY, "torch", "numpy", "pydantic", "yaml"}


def test_the_driver_counts_and_measures_without_torch():
    """It takes seconds to load, and 300 MB: what the driver computes, of a batch and of a tree's scores, is small."""
    loaded = modules_after("import g2rpo_ray.actors.session")
    assert loaded & {*HEAVY, "torch", "matplotlib"} == {"ray"}


def test_asking_for_help_loads_nothing_heavy():
    """Nor does a wrong setting: torch takes seconds to load."""
    assert not modules_after("import g2rpo_ray.commands.train") & {*HEAVY, "torch", "matplotlib"}
    assert "torch" not in modules_after("import g2rpo_ray.actors.pool.dispatch")  # as the cheapest actors


PRODUCT = [file for part in ("g2rpo_ray", "actors", "learner") for file in sorted((TESTS.parent / part).rglob("*.py"))]


def test_no_function_is_longer_than_a_screen():
    functions = [
        (node.end_lineno - node.lineno + 1, f"{file.relative_to(TESTS.parent)}: {node.name}")
        for file in PRODUCT
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 1000
    assert [name for lines, name in functions if lines > 60] == []


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: str(file.relative_to(TESTS)))
def test_no_test_imports_another_and_those_of_one_process_start_no_ray(file):
    text = file.read_text()
    assert not re.findall(r"^(?:from|import) tests\.(?:unit|run|cluster|slow)", text, re.MULTILINE)
    if file.parent.name in ("unit", "run"):
        assert not re.findall(r"^import ray|@pytest\.mark\.(?:cluster|slow)", text, re.MULTILINE)

"""The packages of the image, those of this environment that the project needs:

python -m tests.support.kuberay.packages > deploy/constraints.txt
"""

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
HEAD = """\
# All packages of the image, in the versions of the tests: python -m tests.support.kuberay.packages makes this file.
# The CPU image has no cuda-*, nvidia-* and triton."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def without_their_pins() -> list[str]:
    """What the Makefile installs by `--no-deps`."""
    found = re.search(r"--no-deps (.*)", (ROOT / "Makefile").read_text())
    assert found
    return [word.partition("==")[0] for word in found[1].split()]


def needed() -> dict[str, str]:
    """Name to version of everything that the project needs, directly or not."""
    todo = [
        Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    found = {canonical(name): distribution(name).version for name in without_their_pins()}
    seen: set[tuple[str, str]] = set()
    while todo:
        one = todo.pop()
        for extra in {"", *one.extras} - {extra for name, extra in seen if name == canonical(one.name)}:
            seen.add((canonical(one.name), extra))
            package = distribution(one.name)
            found[canonical(one.name)] = package.version
            further = [Requirement(text) for text in package.requires or []]
            todo += [other for other in further if not other.marker or other.marker.evaluate({"extra": extra})]
    return found


if __name__ == "__main__":
    print("\n".join([HEAD, *(f"{name}=={version}" for name, version in sorted(needed().items()))]))

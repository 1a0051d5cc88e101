"""The version of the code; it must be the same in all processes of a run."""

import hashlib
import os
from functools import cache
from pathlib import Path

__version__ = "0.2.0"


@cache
def code_version() -> str:
    """The package's version and a digest of its sources, for example "0.2.0, sources 3f1c09aa52d4"."""
    return f"{__version__}, sources {digest_of_sources(Path(__file__).parent)}"


def digest_of_sources(root: Path) -> str:
    """12 hex digits of the SHA-256 of the names and contents of all Python files below a folder."""
    folders = os.walk(root, followlinks=True)  # in the repository g2rpo_ray/actors and g2rpo_ray/learner are links
    digest = hashlib.sha256()
    for path in sorted(Path(folder) / name for folder, _, names in folders for name in names if name.endswith(".py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def check_code(of_run: str) -> None:
    """Raise ValueError if the code of this process differs from the driver's, whose version is given."""
    if of_run != code_version():
        raise ValueError(
            f"this node has g2rpo_ray {code_version()}, the run has {of_run}: give all nodes one image "
            "(after an upgrade, restart the cluster; do not change source files during a run)"
        )

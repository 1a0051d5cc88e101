"""A benchmark of benchmarks/, run small."""

import json
import subprocess
from pathlib import Path

from tests.support import preloaded

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def quick(tmp_path, name, *arguments):
    file = tmp_path / "out.json"
    command = preloaded.python(BENCHMARKS / f"{name}.py", "--quick", "--json", file, *arguments)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert f"## {found['title']}" in done.stdout
    assert "| " + " | ".join(found["rows"][0]) + " |" in done.stdout
    assert {"cpu", "cores", "torch"} <= found["machine"].keys()
    return found["rows"]

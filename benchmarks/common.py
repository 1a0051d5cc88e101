"""What all benchmarks share: the command line, the machine, interleaved repeats, a table, JSON."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).parent.parent)
)  # `python benchmarks/NAME.py` finds the packages without installing

from g2rpo_ray.analysis.tables import markdown_table

Row = dict[str, Any]


def parser(description: str, repeats: int = 3) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", metavar="FILE", help="write the table and the machine there too")
    options.add_argument("--repeats", type=int, default=repeats, help="runs of each case, of which the median is given")
    options.add_argument("--quick", action="store_true", help="the smallest cases, once: shows that the program works")
    return options


def alternate(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each case, run A B A B ..., so that a change of the machine's load meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> Row:
    import torch

    described: Row = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_1min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def report(title: str, rows: Sequence[Row], file: str | None, notes: Sequence[str] = ()) -> None:
    """Print a Markdown table with the machine it was measured on; write the same as JSON."""
    described = machine()
    columns = list(rows[0])
    print(f"\n## {title}\n\n" + ", ".join(f"{key} {value}" for key, value in described.items()) + "\n")
    print(markdown_table(columns, ([_cell(row[column]) for column in columns] for row in rows)))
    print("".join(f"\n{note}" for note in notes), flush=True)
    if file:
        content = {"title": title, "machine": described, "command": sys.argv, "rows": rows, "notes": list(notes)}
        Path(file).write_text(json.dumps(content, indent=1) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()

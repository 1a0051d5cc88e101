"""The file of `g2rpo bench`: measured durations of a run's parts, with the settings that they depend on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from g2rpo_ray.config import Config
from g2rpo_ray.config.resume import placement
from g2rpo_ray.rehearsal.times import Times

FORMAT = "g2rpo_ray.bench/1"
MAX_BYTES = 1_000_000
DECIDE = {
    "model": None, "lora": ("rank", "targets"),
    "rollout": ("micro_batch", "decode_batch", "compile", "attention_backend", "completions"),
    "learner": ("micro_batch", "gradient_checkpointing", "compile", "objective", "kl_beta"),
}  # fmt: skip
"""Settings that the measured durations depend on, by section; None: all settings of a section. Also device and
threads."""


def settings(config: Config) -> dict[str, Any]:
    """The settings of `DECIDE` by dotted key, as JSON values, with device and threads."""
    whole = config.model_dump(mode="json")
    places = {key: value for key, value in placement(config).items() if key.startswith(("rollout.", "learner."))}
    return places | {
        f"{section}.{key}": whole[section][key] for section, keys in DECIDE.items() for key in keys or whole[section]
    }


def write(file: Path, config: Config, found: Mapping[str, Any], times: Times) -> None:
    """Write the times and other measurements (`found`) as JSON."""
    content = {"format": FORMAT, "settings": settings(config), **found, "seconds": asdict(times)}
    file.write_text(json.dumps(content, indent=1) + "\n")


def read(file: Path, config: Config) -> Times:
    """Read the times for this configuration from a file.

    Raises:
        ValueError: the file is not of `g2rpo bench`, or was measured with other settings; one line.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        seconds, measured = content["seconds"], content["settings"]
        times = Times(**{field.name: _table(seconds[field.name]) for field in fields(Times)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--calibration: {file} is not a file of `g2rpo bench` ({error})") from None
    for key, value in settings(config).items():
        if measured.get(key) != value:
            raise ValueError(
                f"--calibration: {file} was measured with {key}={measured.get(key)}; the configuration has {value}; "
                "run `g2rpo bench` again with these settings"
            )
    return times


def _table(value: Any) -> Any:
    """A table with sizes as integers, which are text in JSON; other values are unchanged."""
    if not isinstance(value, dict):
        return value
    return {int(key) if key.isdigit() else key: float(seconds) for key, seconds in value.items()}

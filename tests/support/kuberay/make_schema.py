"""Make schema.json from KubeRay's CRDs:  make_schema.py VERSION ray.io_rayclusters.yaml ray.io_rayjobs.yaml

The result is strict JSON Schema of the whole of both kinds, pod templates included: unknown fields are refused. It is
small because descriptions are left out and what occurs more than once is written once.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = ("items", "additionalProperties", "not")
LISTS = ("allOf", "anyOf", "oneOf")
KEPT = ("type", "enum", "required", "minimum", "maximum", "minLength", "maxLength", "pattern", "maxItems", "minItems")
SHARED = 300  # characters from which a repeated part is worth a name


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as JSON Schema that refuses unknown fields."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    out: dict[str, Any] = {key: schema[key] for key in KEPT if key in schema}
    if "properties" in schema:
        out["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
    out |= {key: strict(schema[key]) for key in SCHEMAS if isinstance(schema.get(key), dict)}
    out |= {key: [strict(part) for part in schema[key]] for key in LISTS if key in schema}
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if "properties" in out and "additionalProperties" not in out and not open_ended:
        out["additionalProperties"] = False
    return out


def share(kinds: dict[str, Any]) -> dict[str, Any]:
    """The same schemas, with each repeated part under `$defs`."""
    seen: Counter[str] = Counter()

    def count(part: Any) -> None:
        if isinstance(part, dict):
            text = json.dumps(part, sort_keys=True)
            if len(text) >= SHARED:
                seen[text] += 1
                if seen[text] > 1:
                    return
        for child in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            count(child)

    count(kinds)
    names = {text: f"d{number}" for number, text in enumerate(text for text, times in seen.items() if times > 1)}
    defined: dict[str, Any] = {}

    def place(part: Any) -> Any:
        if isinstance(part, list):
            return [place(child) for child in part]
        if not isinstance(part, dict):
            return part
        name = names.get(json.dumps(part, sort_keys=True))
        if name is None:
            return {key: place(child) for key, child in part.items()}
        if name not in defined:
            defined[name] = None
            defined[name] = {key: place(child) for key, child in part.items()}
        return {"$ref": f"#/$defs/{name}"}

    return {"kinds": {kind: place(schema) for kind, schema in kinds.items()}, "$defs": defined}


def main(version: str, paths: list[str]) -> None:
    kinds = {}
    for path in paths:
        spec = yaml.safe_load(Path(path).read_text())["spec"]
        (v1,) = [served["schema"]["openAPIV3Schema"] for served in spec["versions"] if served["name"] == "v1"]
        schema = strict(v1)
        schema["properties"].pop("status", None)
        schema["properties"]["apiVersion"] = {"const": "ray.io/v1"}
        schema["properties"]["metadata"] = {"type": "object"}
        kinds[spec["names"]["kind"]] = schema
    target = Path(__file__).with_name("schema.json")
    target.write_text(json.dumps({"kuberay": version, **share(kinds)}, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

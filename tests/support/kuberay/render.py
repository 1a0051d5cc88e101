"""What `kubectl kustomize FOLDER` prints, for the part of kustomize that deploy/ uses; anything else is refused."""

import copy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

KNOWN = {
    "apiVersion", "kind", "namespace", "resources", "components", "images", "patches", "configMapGenerator",
    "generatorOptions", "replacements", "transformers",
}  # fmt: skip
OF_THE_CLUSTER = ("PriorityClass",)  # kinds without a namespace


def render(folder: Path, manifests: list[Manifest] | None = None) -> list[Manifest]:
    """The manifests of a kustomization; of a component, what it makes of those given."""
    config = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(config) <= KNOWN, f"{folder}: the renderer does not know {set(config) - KNOWN}"
    out = list(manifests or [])
    for name in config.get("resources", []):
        path = folder / name
        out += render(path) if path.is_dir() else copy.deepcopy(read(path))
    for name in config.get("components", []):
        out = render(folder / name, out)
    out += [_config_map(folder, entry, config["generatorOptions"]) for entry in config.get("configMapGenerator", [])]
    for patch in config.get("patches", []):
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
        out = _patch(out, patch["target"], yaml.safe_load(text))
    for manifest in out:
        if "namespace" in config and manifest["kind"] not in OF_THE_CLUSTER:
            manifest["metadata"]["namespace"] = config["namespace"]
    for image in config.get("images", []):
        _set_image(out, image)
    for replacement in config.get("replacements", []):
        _replace(out, replacement)
    for text in config.get("transformers", []):
        plugin = yaml.safe_load(text)
        assert plugin["kind"] == "PatchTransformer", plugin["kind"]
        out = _patch(out, plugin["target"], yaml.safe_load(plugin["patch"]))
    return out


def read(path: Path) -> list[Manifest]:
    """The documents of a file, each written out: kustomize knows no anchors from here on."""
    return [copy.deepcopy(document) for document in yaml.safe_load_all(path.read_text()) if document]


def at(tree: Any, path: str, separator: str = ".") -> Any:
    """The value at a path of names and list places."""
    for name in path.split(separator):
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    return tree


def _config_map(folder: Path, entry: Manifest, options: Manifest) -> Manifest:
    assert options == {"disableNameSuffixHash": True}, "a RayCluster's reference would not follow a changing name"
    metadata: Manifest = {"name": entry["name"], **entry.get("options", {})}
    data = {name: (folder / name).read_text() for name in entry["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _selected(manifests: list[Manifest], target: Manifest) -> list[Manifest]:
    found = [
        manifest
        for manifest in manifests
        if manifest["kind"] == target["kind"]
        and manifest["metadata"]["name"] == target.get("name", manifest["metadata"]["name"])
    ]
    assert found, f"no manifest is {target}"
    return found


def _patch(manifests: list[Manifest], target: Manifest, patch: Any) -> list[Manifest]:
    found = _selected(manifests, target)
    if isinstance(patch, list):
        for manifest in found:
            for change in patch:
                source = change.pop("from", None)
                _json_patch(manifest, **change, **({} if source is None else {"value": at(manifest, source[1:], "/")}))
        return manifests
    assert patch.get("$patch") == "delete", "of merges, only the one that deletes"
    return [manifest for manifest in manifests if not any(manifest is one for one in found)]


def _json_patch(manifest: Manifest, op: str, path: str, value: Any = None) -> None:
    parent_path, _, leaf = path.removeprefix("/").rpartition("/")
    parent = at(manifest, parent_path, "/")
    if op == "copy":
        assert (leaf, type(parent)) == ("-", list), "of copies, only those to the end of a list"
        parent.append(copy.deepcopy(value))
        return
    key: Any = int(leaf) if isinstance(parent, list) else leaf.replace("~1", "/")
    if op == "add":
        assert isinstance(parent, dict)
        parent[key] = copy.deepcopy(value)
    elif op == "replace":
        assert parent[key] is not None
        parent[key] = copy.deepcopy(value)
    elif op == "remove":
        del parent[key]
    else:
        assert (op, parent[key]) == ("test", value), f"{path} is {parent[key]!r}, not {value!r}"


def _set_image(tree: Any, image: Manifest) -> None:
    if isinstance(tree, list):
        for part in tree:
            _set_image(part, image)
    elif isinstance(tree, dict):
        for key, part in tree.items():
            if key in ("containers", "initContainers"):
                for container in part:
                    if container["image"].partition(":")[0] == image["name"]:
                        container["image"] = f"{image['newName']}:{image['newTag']}"
            else:
                _set_image(part, image)


def _replace(manifests: list[Manifest], replacement: Manifest) -> None:
    source = replacement["source"]
    (origin,) = _selected(manifests, {key: source[key] for key in ("kind", "name")})
    value = at(origin, source["fieldPath"])
    for target in replacement["targets"]:
        for manifest in _selected(manifests, target["select"]):
            for path in target["fieldPaths"]:
                parent, _, leaf = path.rpartition(".")
                at(manifest, parent)[leaf] = copy.deepcopy(value)

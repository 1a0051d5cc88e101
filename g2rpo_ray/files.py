"""Names of files in a configuration, made into paths on the machine that uses them."""

from pathlib import Path

EMBEDDED = "embedded:"


def resolve(name: str) -> str:
    """The path or hub id that `name` stands for, on this machine.

    `embedded:X` is a file that ships with the package, wherever it is installed: `embedded:scenes/X` one of that world,
    `embedded:prompts/X` one of the configurations, any other X one of the quickstart. A name that starts with `~` is
    expanded; anything else is kept as it is.
    """
    if name.startswith(EMBEDDED):
        file, package = name.removeprefix(EMBEDDED), Path(__file__).parent
        within = {"scenes": ".", "prompts": "configs"}.get(file.split("/")[0], "quickstart")
        return str(package / within / file)
    return str(Path(name).expanduser()) if name.startswith("~") else name

"""Names of files in a configuration, made into paths on the machine that uses them."""

from pathlib import Path

EMBEDDED = "embedded:"


def resolve(name: str) -> str:
    """The path or hub id that `name` stands for, on this machine.

    `embedded:X` is file X of the quickstart, or else of the configurations, that ship with the package, wherever the
    package is installed; a name that starts with `~` is expanded; anything else is kept as it is.
    """
    if name.startswith(EMBEDDED):
        file, package = name.removeprefix(EMBEDDED), Path(__file__).parent
        config = package / "configs" / file
        return str(config if file.startswith("prompts/") else package / "quickstart" / file)
    return str(Path(name).expanduser()) if name.startswith("~") else name

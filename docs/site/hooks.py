"""Keeps the links of the pages to files outside of docs/: these are copied into the site, below `repository/`."""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")  # the target of a relative link, without its anchor
OUTSIDE = "repository"


def on_files(files: Files, config: Any) -> Files:
    """Add each file outside of docs/ to which a page leads, and those to which these lead."""
    pages = [file.src_uri for file in files.documentation_pages()]
    while pages:
        page = pages.pop()
        for target in _targets(page):
            if files.get_file_from_path(target) is None and (ROOT / _source(target)).is_file():
                files.append(File.generated(config, target, abs_src_path=str(ROOT / _source(target))))
                pages += [target] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point each relative link to where its file is in the site."""
    uri = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        return relpath(_uri(uri, link[1]), PurePosixPath(uri).parent)

    return LINK.sub(moved, markdown)


def _targets(page: str) -> list[str]:
    return [_uri(page, link) for link in LINK.findall((ROOT / _source(page)).read_text())]


def _source(uri: str) -> str:
    """Where a file of the site is in the repository."""
    path = PurePosixPath(uri)
    return str(path.relative_to(OUTSIDE)) if path.parts[0] == OUTSIDE else f"docs/{uri}"


def _uri(page: str, link: str) -> str:
    """Where the file to which a page's link leads is in the site."""
    found = PurePosixPath(normpath(PurePosixPath(_source(page)).parent / link))
    return str(found.relative_to("docs")) if found.parts[0] == "docs" else f"{OUTSIDE}/{found}"

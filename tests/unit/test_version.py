"""The version that a run and its nodes must share."""

import re
from pathlib import Path

import g2rpo_ray
from g2rpo_ray.version import code_version, digest_of_sources


def test_the_digest_is_of_all_sources(tmp_path):
    for name in ("a/one.py", "a/two.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    linked = tmp_path / "a" / "linked"
    (tmp_path / "b").mkdir()
    linked.symlink_to("../b")
    found = [digest_of_sources(tmp_path / "a")]
    for change in (
        lambda: (tmp_path / "a" / "one.py").write_text("pass \n"),
        lambda: (tmp_path / "a" / "two.py").rename(tmp_path / "a" / "three.py"),
        lambda: (tmp_path / "b" / "four.py").write_text(""),
    ):
        change()
        found.append(digest_of_sources(tmp_path / "a"))
    assert len(set(found)) == 4
    (tmp_path / "a" / "one.pyc").write_text("")  # is made by any that runs
    assert digest_of_sources(tmp_path / "a") == found[-1]


def test_the_version_names_release_and_sources():
    root = Path(g2rpo_ray.__file__).parent
    assert code_version() == f"{g2rpo_ray.__version__}, sources {digest_of_sources(root)}"


def test_all_files_have_one_version():
    root = Path(__file__).parents[2]
    places = [root / "CITATION.cff", *(root / "deploy").rglob("*.yaml"), root / "deploy" / "Dockerfile"]
    texts = "\n".join(file.read_text() for file in places)
    named = set(re.findall(r"^version: (\d+\.\d+\.\d+)$|\b(\d+\.\d+\.\d+)-[cg]pu\b", texts, re.MULTILINE))
    assert {version for pair in named for version in pair if version} == {g2rpo_ray.__version__}
    assert f"## [{g2rpo_ray.__version__}]" in (root / "CHANGELOG.md").read_text()

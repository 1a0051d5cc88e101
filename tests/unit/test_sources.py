"""Prompts with source pictures: who they are, in every format, and which of them meet in a pass of the learner."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from g2rpo_ray.config import dump_config, load_config
from g2rpo_ray.config.prompts import PICTURE_COLUMNS, PROMPT_COLUMNS
from g2rpo_ray.data import read_records, without_heldout
from g2rpo_ray.data.pictures import NAMES, ORIENTATION, picture_file, shown_sources, with_sources
from g2rpo_ray.data.records import EDIT_KEYS, GENEVAL, METADATA
from g2rpo_ray.learner.batch import StepShape, micro_batches, padded
from g2rpo_ray.report.gallery import data_uri, gallery
from g2rpo_ray.rewards.judge import with_sources as shown_to_judge
from g2rpo_ray.rewards.preservation import check_prompt
from g2rpo_ray.runs.hacking import image_traces
from g2rpo_ray.runs.journal import Journal
from g2rpo_ray.runs.reader import read_run
from g2rpo_ray.types import Samples, source_sizes, text_of
from tests.support.sources import WIDE, png, write_pictures


def test_a_prompt_is_its_text_and_its_sources_in_every_format(tmp_path: Path) -> None:
    files = write_pictures(tmp_path)
    wide, other = (with_sources("make it red", [files[name]]) for name in ("wide", "other"))
    both = with_sources("put one into the other", [files["wide"], files["tall"]])
    paths = {name: f"pictures/{name}.png" for name in files}
    rows = [
        {"prompt": "make it red", "source": paths["wide"], "target": paths["tall"], "metadata": {"n": 1}},
        {"prompt": "make it red", "source": paths["other"]},
        {"prompt": "put one into the other", "source": [paths["wide"], paths["tall"]]},
        {"prompt": "no source"},
    ]
    expected = {
        wide: {"n": 1, "source": (files["wide"],), "target": files["tall"]}, other: {"source": (files["other"],)},
        both: {"source": (files["wide"], files["tall"])}, "no source": {},
    }  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert read_records(str(tmp_path / "a.jsonl"), "data.x", 2) == expected
    assert text_of(wide) == text_of(other) == "make it red"
    assert source_sizes(both) == ("96x64", "64x80")
    content = {path: (tmp_path / path).read_bytes() for path in paths.values()}
    columns = {
        "instruction": ["make it red", "make it red", "no source"],  # as `datasets` writes pictures
        "input_image": [{"bytes": content[paths[name]], "path": None} for name in ("wide", "other")] + [None],
    }
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    found = read_records(str(tmp_path / "b.parquet"), "data.x", 1)
    assert list(found) == [wide, other, "no source"]
    assert found[wide]["source"][0].open().tobytes() == WIDE.tobytes()
    uri = "data:image/png;base64," + base64.b64encode(content[paths["tall"]]).decode()
    places = [uri, f"file://{tmp_path}/pictures/tall.png", str(tmp_path / paths["tall"])]
    for place in places:
        assert read_records([{"prompt": "x", "source": place}], "data.x", 1) == {
            with_sources("x", [files["tall"]]): {"source": (files["tall"],)}
        }
    (tmp_path / "c.jsonl").write_text('{"prompt": "x", "source": "laion"}')  # a run on text reads no such field
    assert read_records(str(tmp_path / "c.jsonl"), "data.x") == {"x": {}}
    assert without_heldout([wide, other, both], [wide]) == (other, both)


class Decoded:
    """As much of `datasets.Image` as is asked for."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class Table:
    """As much of a `datasets.Dataset` with undecoded pictures as is asked for: they are decoded when rows are read."""

    def __init__(self, columns: dict, features: dict) -> None:
        self._columns, self.features, self.column_names = columns, features, list(columns)

    def select_columns(self, names: list[str]) -> "Table":
        return Table({name: self._columns[name] for name in names}, {name: self.features[name] for name in names})

    def cast_column(self, name: str, feature: Decoded) -> "Table":
        return Table(self._columns, {**self.features, name: feature})

    def __iter__(self):
        for row in zip(*self._columns.values(), strict=True):
            yield {
                name: Image.open(io.BytesIO(value["bytes"])) if getattr(self.features[name], "decode", False) else value
                for name, value in zip(self._columns, row, strict=True)
            }


def test_pictures_of_a_list_and_of_a_dataset_are_those_of_a_file(tmp_path: Path) -> None:
    files = write_pictures(tmp_path)
    content = {name: file.read() for name, file in files.items()}
    expected = {
        with_sources("make it red", [files["wide"]]): {"source": (files["wide"],), "mask": files["tall"]},
        with_sources("make it red", [files["other"], files["tall"]]): {"source": (files["other"], files["tall"])},
    }
    rows = [
        {"prompt": "make it red", "source": content["wide"], "mask": {"bytes": content["tall"]}, "id": {1}},
        {"prompt": "make it red", "source": [content["other"], tmp_path / "pictures" / "tall.png"]},
    ]
    config = load_config(**{"data.train_prompts": rows, "model.path": "x"})
    assert read_records(config.data.train_prompts, "data.x", 2) == expected
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    picture = {"bytes": content["wide"], "path": None}
    columns = {"edit_instruction": ["make it red"], "input_image": [picture], "id": [1]}
    table = Table(columns, {"edit_instruction": "string", "input_image": Decoded(), "id": "int64"})
    given = load_config(**{"data.train_prompts": table}).data.train_prompts
    assert list(read_records(given, "data.x", 1)) == list(expected)[:1]


def test_pictures_in_memory_are_read_as_they_are() -> None:
    for picture in (WIDE, np.asarray(WIDE)):
        given = load_config(**{"data.train_prompts": [{"prompt": "x", "source": picture}]}).data.train_prompts
        ((prompt, metadata),) = read_records(given, "data.x", 1).items()
        assert source_sizes(prompt) == ("96x64",)
        assert metadata["source"][0].open().tobytes() == WIDE.tobytes()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "source": {1}}, "entry 1: source is a set that JSON cannot hold; give text, numbers"),
        ({"prompt": "x", "metadata": {"n": b"1"}}, "entry 1: metadata is a dict that JSON cannot hold; give text"),
        (
            {"prompt": "x", "source": bytes(17 * 2**20)},
            "pictures: more than 16 MiB given, .*; give paths, or a Parquet",
        ),
    ],
)
def test_what_settings_cannot_hold_is_refused_in_a_line(row: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"^data.train_prompts.{words}") as error:
        load_config(**{"data.train_prompts": [row]})
    assert "\n" not in str(error.value)


def test_settings_keep_every_field_that_is_read() -> None:
    assert set(PROMPT_COLUMNS) == {*EDIT_KEYS, METADATA, *GENEVAL}
    assert tuple(name for names in NAMES.values() for name in names) == PICTURE_COLUMNS


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('{"prompt": "a", "source": "none.png"}', "line 1: '.*none.png' cannot be read"),
        ('{"prompt": "a", "source": "a.jsonl"}', "line 1: 'a.jsonl' is no picture that Pillow reads"),
        ('{"prompt": "a", "source": 7}', "line 1: 7 is no path, URI or bytes of a picture"),
        (
            '{"prompt": "a", "source": ["pictures/wide.png", "pictures/tall.png"]}',
            "line 1 has 2 sources; model.sources=1",
        ),
        ('{"prompt": "a [source 1x1 00000000000000000000000000000000]"}', "line 1 ends as a prompt with sources does"),
        (
            '{"prompt": "a", "source": "pictures/wide.png"}\n'
            '{"prompt": "a", "source": "pictures/wide.png", "target": "pictures/tall.png"}',
            "twice, with different metadata",
        ),
    ],
)
def test_a_source_that_is_no_picture_is_refused_in_a_line(tmp_path: Path, entry: str, words: str) -> None:
    write_pictures(tmp_path)
    (tmp_path / "a.jsonl").write_text(entry)
    with pytest.raises(ValueError, match=f"^data.x: .*{words}") as error:
        read_records(str(tmp_path / "a.jsonl"), "data.x", 1)
    assert "\n" not in str(error.value)


def test_a_field_source_of_ones_own_metadata_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat", "metadata": {"source": "DrawBench"}}\n')
    for sources in (0, 1):
        records = read_records(str(tmp_path / "prompts.jsonl"), "data.train_prompts", sources)
        assert records == {"a cat": {"source": "DrawBench"}}
    assert shown_to_judge([1, 2], records["a cat"]) == [1, 2]
    with pytest.raises(ValueError, match="no source image"):
        check_prompt("a cat", records["a cat"])


def test_pictures_are_upright_over_white_and_may_not_change(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    clear.save(tmp_path / "a.png", exif=exif)
    file = picture_file("a.png", tmp_path)
    assert file.size == (2, 3)
    assert np.asarray(file.open()).tolist() == [[[255] * 3, [255, 0, 0]], *[[[255] * 3] * 2] * 2]
    (tmp_path / "a.png").write_bytes(png(WIDE))
    with pytest.raises(ValueError, match="is not what it was when the prompts were read"):
        file.read()


def test_every_rank_makes_as_many_passes_of_equal_sizes() -> None:
    wide, tall = "a [source 96x64 " + "0" * 32 + "]", "a [source 64x80 " + "1" * 32 + "]"
    step = StepShape((0, None), 1, (((), 2), (("64x80",), 3), (("96x64",), 4)))
    for own in ([wide] * 4 + ["b"], [tall, "b", tall, "b"], [wide, tall, "b"]):
        states = padded(own, own, step, lambda prompt: prompt)
        passes = list(micro_batches(states, 2, step))
        assert [len(some) for some in passes] == [2, 2, 1, 2, 2]
        assert all(len({source_sizes(prompt) for prompt in some}) == 1 for some in passes)
        assert [prompt for prompt in states if prompt == wide][: own.count(wide)] == [wide] * own.count(wide)
    assert list(micro_batches("abcde", 2)) == ["ab", "cd", "e"]


def test_sources_stand_before_the_results_in_grid_and_report(tmp_path: Path) -> None:
    files, config = write_pictures(tmp_path), load_config()
    prompts = [with_sources("make it red", [files["wide"]]), "no source"]
    sources = shown_sources(prompts, {prompts[0]: {"source": (files["wide"],)}}, (32, 32))
    assert shown_sources(prompts[1:], {}, (32, 32)) == []
    assert [sources[0][row].mean() for row in (0, 31)] == [255, 255]  # 96 x 64 fitted into 32 x 32
    assert sources[0][16].std() > 1 == sources[1].mean() / 255
    pictures = [np.full((32, 32, 3), level, np.uint8) for level in (50, 150)]
    scores = {name: np.ones((2, 2), np.float32) for name in config.all_rewards}
    samples = Samples(prompts, scores, pictures, 0, [image_traces(picture[None]) for picture in pictures])
    with Journal(config, tmp_path / "run", 0, sources=sources) as journal:
        journal.heldout(0, samples)
    assert Image.open(tmp_path / "run" / "samples" / "000000.png").width == 3 * 96
    run = read_run(str(tmp_path / "run"))
    assert np.array_equal(run.sources, sources)
    found = gallery([run])
    assert found is not None
    assert found["prompts"] == ["make it red", "no source"]
    assert [column["name"] for column in found["columns"]] == ["source", "before", "now"]
    assert found["columns"][0]["pictures"][0][0]["source"] == data_uri(sources[0])

"""Prompts, their order, and the store of embeddings."""

import gzip
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2rpo_ray.actors.workers.encoder import encode_prompts
from g2rpo_ray.config import ModelConfig, load_config
from g2rpo_ray.config.resume import settings as made_with
from g2rpo_ray.data import (
    EmbeddingStore,
    drawn_prompts,
    fingerprint,
    iteration_prompts,
    read_prompts,
    read_records,
    without_heldout,
)
from g2rpo_ray.data.embeddings import FIRST_PART, PART, DamagedPart
from g2rpo_ray.preflight import read_run_prompts
from g2rpo_ray.types import PromptEmbedding
from tests.support import preloaded
from tests.support.embeddings import embedding
from tests.support.tiny_flux import write_tiny_flux


def test_prompts_are_read_in_order_once_each(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff a red cat \r\n\n\tein grüner Hund\na red cat\nA red cat\u2028two\n".encode())
    assert read_prompts(str(file), "data.x") == ("a red cat", "ein grüner Hund", "A red cat\u2028two")


HPDV2 = [
    {"human_preference": [1, 0], "prompt": "a red cat", "file_path": ["a.jpg", "b.jpg"]},
    {"human_preference": [0, 1], "prompt": "a red cat", "file_path": ["a.jpg", "c.jpg"]},
    {"human_preference": [1, 0], "prompt": " ein grüner Hund ", "file_path": []},
]


def write_prompt_files(folder: Path) -> None:
    """The formats, all with the prompts "a red cat" and "ein grüner Hund"."""
    (folder / "train.json").write_text(json.dumps(HPDV2))
    (folder / "anime.json").write_text(json.dumps(["a red cat", "ein grüner Hund", "a red cat"]))
    lines = [*HPDV2, "a red cat", {"prompt": None}]
    (folder / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    (folder / "captions.jsonl").write_text('{"caption": "a red cat", "text": "no"}\n{"caption": "ein grüner Hund"}')
    columns = {"caption": ["a red cat", None, "ein grüner Hund", "a red cat"], "TEXT": ["a", "b", "c", "d"]}
    pq.write_table(pa.table(columns), folder / "table.parquet")
    (folder / "style-a.txt").write_text("a red cat\n")
    (folder / "style-b.json").write_text('["ein grüner Hund", "a red cat"]')


@pytest.mark.parametrize(
    "name",
    ["train.json", "anime.json", "lines.jsonl", "captions.jsonl", "table.parquet", "style-*", "train.json#prompt"],
)
def test_the_ending_decides_the_format(tmp_path: Path, name: str) -> None:
    write_prompt_files(tmp_path)
    assert read_prompts(str(tmp_path / name), "data.x") == ("a red cat", "ein grüner Hund")


def test_another_key_or_column_is_named_after_the_file(tmp_path: Path) -> None:
    write_prompt_files(tmp_path)
    assert read_prompts(str(tmp_path / "table.parquet#TEXT"), "data.x") == tuple("abcd")
    (tmp_path / "odd#name.txt").write_text("a\n")
    assert read_prompts(str(tmp_path / "odd#name.txt"), "data.x") == ("a",)


TABLE = 'id,prompt,caption\r\n1,"a cat, red",x\r\n\r\n2,"two ""big""\ndogs",y\r\n3,,z\r\n'

LINES = '{"prompt": "a cat, red"}\n{"prompt": "two \\"big\\"\\ndogs"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", TABLE),
        ("a.CSV", "\ufeff" + TABLE),
        ("a.tsv", 'prompt\tid\na cat, red\t1\n"two ""big""\ndogs"\t2\n'),
        ("a.ndjson", LINES),
        ("a.JSONL", LINES),
        ("a.jsonl.gz", LINES),
        ("a.Csv.GZ", TABLE),
    ],
)
def test_endings_in_any_case_tables_and_compressed_files(tmp_path: Path, name: str, content: str) -> None:
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    assert read_prompts(str(tmp_path / name), "data.x") == ("a cat, red", 'two "big"\ndogs')


def test_a_column_of_a_table_is_chosen_and_its_metadata_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TABLE)
    assert read_prompts(f"{tmp_path}/a.csv#caption", "data.x") == ("x", "y", "z")
    (tmp_path / "b.csv").write_text('prompt,metadata\na,"{""n"": 1}"\nb,\n')
    assert read_records(str(tmp_path / "b.csv"), "data.x") == {"a": {"n": 1}, "b": {}}
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"a\rb\r\nc"))
    assert read_prompts(str(tmp_path / "c.txt.gz"), "data.x") == tuple("abc")


def test_columns_of_text_in_every_encoding_of_parquet(tmp_path: Path) -> None:
    plain = pa.array(["a red cat", None, "ein grüner Hund"])
    views = plain.cast(pa.string_view())
    for column in (plain.dictionary_encode(), plain.cast(pa.large_string()), views):
        pq.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
        assert read_prompts(str(tmp_path / "a.parquet"), "data.x") == ("a red cat", "ein grüner Hund")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.PARQUET.gz").write_bytes(gzip.compress(data))
    assert read_prompts(str(tmp_path / "b.PARQUET.gz"), "data.x") == ("a red cat", "ein grüner Hund")


UTF_16 = "a red cat\n".encode("utf-16-le").decode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt#title", "a\n", "#title names a column, and a text file has none"),
        ("a.txt", 'a\n{"prompt": "a"}\n', "line 2 looks like JSON, not like a prompt; give the file the ending .jsonl"),
        ("a.txt", '[\n  {\n    "prompt": "a"', "line 2 looks like JSON"),
        ("a", '[{"prompt": "a"}]', "line 1 looks like JSON"),
        ("a.txt", "a\nb\0c\n", "line 2 holds a NUL byte, so it is UTF-16 or no text; save it as UTF-8"),
        ("a.txt", UTF_16, "line 1 holds a NUL byte"),
        ("a.csv", UTF_16, "line 1 holds a NUL byte"),
        ("a.txt", "\xff\xfe" + UTF_16, "is not UTF-8 at byte 0"),
        ("a.jsonl", '"a"\n"b \\ud83d c"', "line 2 holds \\ud83d, half of a surrogate pair"),
        ("a.json", '[{"prompt": "a", "metadata": {"n": "\\ude00"}}]', "entry 1 holds \\ude00, half of a"),
        ("a.jsonl", '"a\\u0000b"', "line 1 holds a NUL character"),
        ("a.csv", "id,title\n1,a\n", "its columns are id, title; expected a column with the prompt as prompt or"),
        ("a.csv#name", "prompt\na\n", "its columns are prompt; expected a column with the prompt as name"),
        ("a.csv", "", "it has no column"),
        ("a.csv", "prompt,id,prompt\na,1,b\n", "2 of its columns are called prompt; rename the others"),
        (
            "a.csv",
            "prompt,id\na,1\na cat, red,2\n",
            "line 3 has 3 fields, but the first line has 2; put a text with ','",
        ),
        ("a.tsv", 'prompt\n"JAZZ" on a sign\n', "line 2: ' ' expected after '\"'; put a text with a double quote in"),
        ("a.csv", 'prompt\n"a\n', "line 2: unexpected end of data"),
        ("a.txt.gz", "a red cat", "cannot be decompressed (Not a gzipped file"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says_is_refused(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / name.partition("#")[0]).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^data.x: .*/a") as error:
        read_prompts(str(tmp_path / name), "data.x")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_compressed_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a red cat\n" * 99)[:-9])
    with pytest.raises(ValueError, match=r"^data.x: .*/a\.txt\.gz cannot be decompressed"):
        read_prompts(str(tmp_path / "a.txt.gz"), "data.x")


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["text", "text", "id"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^data.x: .*a\.parquet: 2 of its columns are called text; rename"):
        read_prompts(str(tmp_path / "a.parquet"), "data.x")
    assert read_prompts(f"{tmp_path}/a.parquet#id", "data.x") == ("c",)


@pytest.mark.parametrize("name", ["~unknownuser/a.txt", "x" * 256, "a" * 200 + "/" + "b" * 4000, ""])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.x: .* given; ") as error:
        read_prompts(name, "data.x")
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '{"prompt": "a"}', "it holds one dict"),
        ("a.json", '["a", 3]', "entry 2 is 3, not text"),
        ("a.json", '[{"title": "a", "id": 1}]', "entry 1 has no prompt or caption or text, only title, id"),
        ("a.json", "[half", "expected a list of objects"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": ["a"]}', "line 2 is ['a'], not text"),
        ("a.jsonl#name", '{"prompt": "a"}', "line 1 has no name"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": b}', "line 2 column 12: Expecting value"),
        ("a.json", '["a",\n"b"', "line 2 column 4: Expecting ',' delimiter"),
        ("a.jsonl", '"a"\n' + "[" * 100_000, "line 2 is nested too deep"),
        ("a.json", '[["a"]]', "entry 1 is ['a'], not text"),
        ("a.parquet", "not parquet", "expected a string column with the prompt as prompt or caption or text"),
    ],
)
def test_entries_without_a_prompt_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name.partition("#")[0]).write_text(content)
    with pytest.raises(ValueError, match=r"^data.x: .*/a\.") as error:
        read_prompts(str(tmp_path / name), "data.x")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_such_a_column_is_named_with_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "title": ["a"]}), tmp_path / "a.parquet")
    for name, words in (("a.parquet", "its columns are id, title"), ("a.parquet#id", "column id holds int64")):
        with pytest.raises(ValueError, match=words):
            read_prompts(str(tmp_path / name), "data.x")


COUNTED = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}

BESIDE = {"tag": "position", "include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}

RECORDS = {"two cats": COUNTED, "a dog left of a cat": BESIDE, "a tree": {}}


def write_metadata_files(folder: Path) -> None:
    """RECORDS as GenEval publishes its prompts, as an object or its text in a field, and as columns of a table."""
    lines = [{**known, "prompt": prompt, "id": 3} for prompt, known in RECORDS.items()]
    (folder / "geneval.jsonl").write_text("\n".join(map(json.dumps, lines)))
    whole = [{"text": prompt, "metadata": known or None} for prompt, known in RECORDS.items()]
    (folder / "field.json").write_text(json.dumps(whole))
    texts = [json.dumps(known) if known else None for known in RECORDS.values()]
    pq.write_table(pa.table({"prompt": list(RECORDS), "metadata": texts, "id": [1, 2, 3]}), folder / "text.parquet")
    exclude = [known.get("exclude") for known in RECORDS.values()]
    include = [json.dumps(known["include"]) if known else None for known in RECORDS.values()]  # of mixed types: text
    columns = {"prompt": list(RECORDS), "include": include, "exclude": exclude, "tag": ["counting", "position", None]}
    pq.write_table(pa.table(columns), folder / "columns.parquet")


@pytest.mark.parametrize("name", ["geneval.jsonl", "field.json", "text.parquet", "columns.parquet"])
def test_metadata_comes_with_its_prompt_whatever_the_format(tmp_path: Path, name: str) -> None:
    write_metadata_files(tmp_path)
    assert read_records(str(tmp_path / name), "data.x") == RECORDS
    assert read_prompts(str(tmp_path / name), "data.x") == tuple(RECORDS)


def test_a_structure_of_parquet_has_no_nulls_left(tmp_path: Path) -> None:
    include = [[{"class": "cat", "count": 1, "color": "red"}], [{"class": "dog", "count": 1}]]
    pq.write_table(pa.table({"prompt": ["a red cat", "a dog"], "include": include}), tmp_path / "a.parquet")
    expected = {"a red cat": {"include": include[0]}, "a dog": {"include": include[1]}}
    assert read_records(str(tmp_path / "a.parquet"), "data.x") == expected


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"prompt": "a", "metadata": "laion"}], "entry 1 has metadata 'laion', not an object or the JSON text of one"),
        ([{"prompt": "a", "metadata": "{half"}], "entry 1 has metadata that is no JSON: Expecting property name"),
        ([{"prompt": "a", "metadata": {"x": 1}}, "a"], "has the prompt 'a' twice, with different metadata"),
    ],
)
def test_metadata_that_is_wrong_is_named(tmp_path: Path, entries: list[object], words: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"^data.x: .*/a\.json") as error:
        read_records(str(tmp_path / "a.json"), "data.x")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_metadata_is_part_of_what_a_checkpoint_was_made_with() -> None:
    def digests(*metadata: dict[str, object]) -> list[dict[str, object]]:
        return [made_with(load_config(), ("a", "b"), ("c",), known)["data"] for known in metadata]

    without, with_train, with_other, with_heldout = digests({}, {"b": {"x": 1}}, {"b": {"x": 2}}, {"c": {"x": 1}})
    digest = hashlib.sha256(b"a\nb").hexdigest()[:16]  # as it was before there was metadata
    assert without["train_prompts"] == f"2 prompts, sha256 {digest}"
    assert len({data["train_prompts"] for data in (without, with_train, with_other)}) == 3
    assert with_heldout["train_prompts"] == without["train_prompts"]
    assert with_heldout["heldout_prompts"] != without["heldout_prompts"]


def test_a_prompt_that_a_reward_can_never_score_is_refused_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text('a sign that says "open"\na cat\n')
    sets = ["rewards={text: {kind: ocr}}", "eval_rewards={}", "data.prompts_per_iteration=1"]
    sets += [f"data.{name}={tmp_path / name.split('_')[0]}.txt" for name in ("train_prompts", "heldout_prompts")]
    (tmp_path / "heldout.txt").write_text('"closed"\n')
    with pytest.raises(ValueError, match=r"^rewards\.text: the prompt 'a cat' has no quoted text, which ocr needs"):
        read_run_prompts(load_config(None, sets))
    (tmp_path / "train.txt").write_text('a sign that says "open"\n')
    assert read_run_prompts(load_config(None, sets)).metadata == {}


def test_held_out_prompts_are_not_trained_on() -> None:
    train = ("a cat", "A  Red cat", "a red  CAT", "a red car")
    assert without_heldout(train, ["a red cat", "a dog"]) == ("a cat", "a red car")


@settings(max_examples=150)
@given(st.integers(1, 25), st.data(), st.integers(0, 2**40), st.integers(0, 40))
def test_the_drawn_prompts_are_those_that_the_iterations_use(n: int, data: st.DataObject, seed: int, used: int) -> None:
    prompts = [f"prompt {i}" for i in range(n)]
    per_iteration = data.draw(st.integers(1, n))
    stream = itertools.chain.from_iterable(iteration_prompts(prompts, per_iteration, seed, i) for i in range(used))
    assert drawn_prompts(prompts, per_iteration, seed, used) == tuple(dict.fromkeys(stream))


def test_prompt_files_that_cannot_be_used_are_named_with_their_key(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("grüner Hund".encode("latin-1"))
    for name, words in (("gone.txt", "cannot read"), ("empty.txt", "holds no prompt"), ("latin.txt", "not UTF-8")):
        with pytest.raises(ValueError, match=f"^data.train_prompts: .*{name}") as error:
            read_prompts(str(tmp_path / name), "data.train_prompts")
        assert words in str(error.value)
        assert "\n" not in str(error.value)


@settings(max_examples=150)
@given(st.integers(1, 25), st.data(), st.integers(0, 2**40), st.integers(0, 40))
def test_an_epoch_uses_no_prompt_twice_and_as_many_as_fit(n: int, data: st.DataObject, seed: int, epoch: int) -> None:
    prompts = [f"prompt {i}" for i in range(n)]
    per_iteration = data.draw(st.integers(1, n))
    iterations = n // per_iteration
    drawn = [iteration_prompts(prompts, per_iteration, seed, epoch * iterations + i) for i in range(iterations)]
    stream = list(itertools.chain.from_iterable(drawn))
    assert len(stream) == len(set(stream)) == iterations * per_iteration
    assert set(stream) <= set(prompts)
    assert iteration_prompts(prompts, per_iteration, seed, epoch * iterations) == drawn[0]


def test_the_order_depends_on_seed_and_epoch() -> None:
    prompts = [f"prompt {i}" for i in range(30)]
    orders = [iteration_prompts(prompts, 30, seed, k) for seed in (0, 1) for k in (0, 1)]
    assert len({*orders, tuple(prompts)}) == 5


def test_every_prompt_is_as_likely_in_every_place() -> None:
    prompts = [f"prompt {i}" for i in range(5)]
    first = Counter(iteration_prompts(prompts, 5, seed, 0)[0] for seed in range(2000))
    assert min(first.values()) > 330  # 400 expected, standard deviation 18


def test_the_order_is_the_same_in_another_process() -> None:
    program = "from g2rpo_ray.data import iteration_prompts as p; print(p('abcdefg', 3, 5, 11))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(iteration_prompts("abcdefg", 3, 5, 11))


def test_more_prompts_an_iteration_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data\.prompts_per_iteration: 3 given, but data\.train_prompts has 2"):
        iteration_prompts(["a", "b"], 3, 0, 0)


def assert_same(a: PromptEmbedding, b: PromptEmbedding) -> None:
    assert (a.prompt, list(a.tensors)) == (b.prompt, list(b.tensors))
    for one, other in zip(a.tensors.values(), b.tensors.values(), strict=True):
        assert (one.dtype, one.data.dtype, one.data.shape) == (other.dtype, other.data.dtype, other.data.shape)
        assert one.data.tobytes() == other.data.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embeddings_come_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    prompts = ["a", "ein grüner Hund", "c", "d"]
    store = EmbeddingStore(tmp_path / "new" / "folder", "f")
    assert store.missing(["a", "b", "a"]) == ["a", "b"]
    store.add([embedding(p, dtype) for p in prompts[:3]])
    store.add([embedding(p, dtype) for p in prompts[3:]])
    for opened in (store, EmbeddingStore(tmp_path / "new" / "folder", "f")):
        assert opened.missing([*prompts, "e"]) == ["e"]
        wanted = ["d", "ein grüner Hund", "d", "a"]
        for prompt, found in zip(wanted, opened.get(wanted), strict=True):
            assert_same(found, embedding(prompt, dtype))


def test_a_part_that_a_kill_cut_off_is_ignored(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, "f").add([embedding("a")])
    (part,) = (tmp_path / "f").iterdir()
    (tmp_path / "f" / "part-0.tmp").write_bytes(part.read_bytes()[:40])
    store = EmbeddingStore(tmp_path, "f")
    assert store.missing(["a", "b"]) == ["b"]
    store.add([embedding("b")])
    assert EmbeddingStore(tmp_path, "f").missing(["a", "b"]) == []


def test_a_kill_while_writing_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EmbeddingStore(tmp_path, "f")
    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.add([embedding("a")])
    assert store.missing(["a"]) == ["a"]
    assert EmbeddingStore(tmp_path, "f").missing(["a"]) == ["a"]


def interrupt(_: int) -> None:
    raise KeyboardInterrupt


ENCODE = """
import sys
import torch
torch.set_num_threads(1)
from g2rpo_ray.config import load_config
from g2rpo_ray.data import EmbeddingStore, encode_missing
from g2rpo_ray.models import FlowModel
directory, number = sys.argv[1], int(sys.argv[2])
store = EmbeddingStore(directory, "f")
missing = store.missing([f"a red circle {i}" for i in range(number)])
model = FlowModel.load(load_config().model, "cpu", text_encoders=True)
print("missing", len(missing), flush=True)
for done, _ in encode_missing(store, missing, model.encode):
    print(done, flush=True)
    sys.stdin.readline()
"""


def test_encoding_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    number = FIRST_PART + PART + 3

    def encode(folder: str) -> "subprocess.Popen[str]":
        command = preloaded.python("-c", ENCODE, tmp_path / folder, number)
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    killed = encode("a")
    assert killed.stdout is not None
    assert [killed.stdout.readline() for _ in range(2)] == [f"missing {number}\n", f"{FIRST_PART}\n"]
    killed.kill()  # SIGKILL, between two parts
    killed.wait()
    printed, _ = encode("a").communicate("\n" * 9)
    assert printed.split() == ["missing", str(number - FIRST_PART), str(FIRST_PART), str(number - FIRST_PART)]
    encode("b").communicate("\n" * 9)
    prompts = [f"a red circle {i}" for i in range(number)]
    stores = [EmbeddingStore(tmp_path / folder, "f").get(prompts) for folder in "ab"]
    for a, b in zip(*stores, strict=True):
        assert_same(a, b)


def test_prompts_that_are_cut_are_told_once_while_they_are_encoded(tmp_path: Path) -> None:
    long = "a red circle " * 10
    found = [part.cut for part in encode_prompts(load_config(), str(tmp_path), ["a red circle", long])]
    assert [len(line) > 0 for line in found] == [False, True, False]
    assert re.search(rf"are truncated: '{long[:60]}' has 3[0-9] tokens, 16 are read$", found[1])
    assert [part.cut for part in encode_prompts(load_config(), str(tmp_path), [long])] == [""]


def test_wherever_a_part_is_damaged_its_prompts_are_encoded_again(tmp_path: Path) -> None:
    """A flipped bit in any byte, in turn: no embedding that is read is another than was written."""
    EmbeddingStore(tmp_path, "f").add([embedding(prompt) for prompt in "ab"])
    (part,) = (tmp_path / "f").iterdir()
    sound = part.read_bytes()
    found = read_late = 0
    for place in range(0, len(sound), 17):
        content = bytearray(sound)
        content[place] ^= 1 << place % 8
        part.write_bytes(content)
        store = EmbeddingStore(tmp_path, "f")
        missing = store.missing("ab")
        found += bool(missing)
        store.add([embedding(prompt) for prompt in missing])
        for prompt, read in zip("ab", EmbeddingStore(tmp_path, "f").get("ab"), strict=True):
            assert_same(read, embedding(prompt))
        for file in (tmp_path / "f").iterdir():
            file.unlink()
        part.write_bytes(content)
        store = EmbeddingStore(tmp_path, "f")
        for prompt in "ab":  # what was not verified at the start
            with suppress(KeyError, DamagedPart):
                assert_same(store.get(prompt)[0], embedding(prompt))
                read_late += 1
    places = len(range(0, len(sound), 17))
    assert places / 3 < found < places
    assert 0 < read_late < 2 * places


def test_a_damaged_part_takes_no_other_with_it(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, "f")
    store.add([embedding(prompt) for prompt in "ab"])
    (part,) = (tmp_path / "f").iterdir()
    store.add([embedding("c")])
    written = embedding("b").tensors["sequence"].data.tobytes()
    part.write_bytes(part.read_bytes().replace(written, bytes([written[0] ^ 1]) + written[1:]))
    store = EmbeddingStore(tmp_path, "f")
    assert (store.missing("abc"), store.damaged) == (["a", "b"], [part.name])
    store.add([embedding(prompt) for prompt in "ab"])
    for prompt, read in zip("abc", EmbeddingStore(tmp_path, "f").get("abc"), strict=True):
        assert_same(read, embedding(prompt))


def test_a_storage_that_fails_damages_no_part(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, "f")
    store.add([embedding("a")])
    (part,) = (tmp_path / "f").iterdir()
    part.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        store.get(["a"])
    (tmp_path / "elsewhere").rename(part)
    assert_same(store.get(["a"])[0], embedding("a"))


def test_a_part_of_before_there_were_digests_is_read(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, "f").add([embedding("a")])
    (part,) = (tmp_path / "f").iterdir()
    pq.write_table(
        pq.read_table(part).drop(["sha256"]), part, row_group_size=1, compression="none", use_dictionary=False
    )
    store = EmbeddingStore(tmp_path, "f")
    assert store.missing(["a"]) == []
    assert_same(store.get(["a"])[0], embedding("a"))


def test_the_negative_prompt_has_a_role_of_its_own(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, "f")
    store.add([embedding("a")])
    assert store.missing(["a"], "negative") == ["a"]
    store.add([embedding("b")], "negative")
    store = EmbeddingStore(tmp_path, "f")
    assert (store.missing(["b"]), store.missing(["b"], "negative")) == (["b"], [])
    (found,) = store.get(["a"], "b")
    assert_same(found, embedding("a"))
    assert_same(found.negative, embedding("b"))
    assert store.get(["a"])[0].negative is None


def test_folders_of_an_earlier_version_are_recognised_and_not_read(tmp_path: Path) -> None:
    old, new = "0" * 64, "1" * 64
    row = {"prompt": "a", "dtype": "float32", "pooled": b"1234", "sequence": b"1234", "sequence_length": 1}
    (tmp_path / old).mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / old / "part-1.parquet")
    store = EmbeddingStore(tmp_path, new)
    assert (store.missing(["a"]), store.outdated()) == (["a"], [old])
    store.add([embedding("a")])
    assert EmbeddingStore(tmp_path, new).outdated() == EmbeddingStore(tmp_path, "2" * 64).outdated()[1:] == []


def test_another_fingerprint_sees_nothing(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, "f").add([embedding("a")])
    assert EmbeddingStore(tmp_path, "g").missing(["a"]) == ["a"]


def test_one_prompt_is_read_without_the_others(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, "f")
    store.add([embedding(p) for p in "abc"])
    (part,) = (tmp_path / "f").iterdir()
    content = bytearray(part.read_bytes())
    for other in "ac":
        at = content.index(embedding(other).tensors["sequence"].data.tobytes())
        content[at : at + 8] = b"\0" * 8
    part.write_bytes(content)
    assert_same(store.get(["b"])[0], embedding("b"))


def test_the_fingerprint_follows_what_decides_an_embedding(tmp_path: Path) -> None:
    path = write_tiny_flux(tmp_path / "tiny")

    def of(path: object, **changes: object) -> str:
        return fingerprint(ModelConfig.model_validate({"path": str(path), **changes}))

    original = of(path)
    shutil.copytree(path, tmp_path / "copy")
    (tmp_path / "copy" / "transformer" / "config.json").write_text("{}")  # no part in an embedding
    assert of(tmp_path / "copy") == original == of(path, height=32, guidance_scale=1)
    changed = {of(path, dtype="float32"), of(path, max_sequence_length=256)}
    for file in ("text_encoder/model.safetensors", "text_encoder_2/config.json", "tokenizer_2/tokenizer.json"):
        shutil.copytree(path, tmp_path / "copy", dirs_exist_ok=True)
        with (tmp_path / "copy" / file).open("ab") as stream:
            stream.write(b" ")
        changed.add(of(tmp_path / "copy"))
    changed |= {of("a/b"), of("a/c"), of("a/b", revision="1"), of("a/b", dtype="float32")}
    assert len(changed | {original}) == 10

"""Prompts, their order, and the store of embeddings."""

import itertools
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2rpo_ray.config import ModelConfig
from g2rpo_ray.data import EmbeddingStore, fingerprint, iteration_prompts, read_prompts
from g2rpo_ray.types import PromptEmbedding
from tests.tiny_flux import write_tiny_flux


def test_prompts_are_read_in_order_once_each(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff a red cat \r\n\n\tein grüner Hund\na red cat\nA red cat\u2028two\n".encode())
    assert read_prompts(str(file), "data.x") == ("a red cat", "ein grüner Hund", "A red cat\u2028two")


def test_prompt_files_that_cannot_be_used_are_named_with_their_key(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("grüner Hund".encode("latin-1"))
    for name, words in (("gone.txt", "cannot read"), ("empty.txt", "holds no prompt"), ("latin.txt", "not UTF-8")):
        with pytest.raises(ValueError, match=f"^data.train_prompts: .*{name}") as error:
            read_prompts(str(tmp_path / name), "data.train_prompts")
        assert words in str(error.value)
        assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=150)
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
    with pytest.raises(ValueError, match=r"^data\.prompts_per_iteration: 3 given, but there are 2 prompts"):
        iteration_prompts(["a", "b"], 3, 0, 0)


def embedding(prompt: str, dtype: str = "float32") -> PromptEmbedding:
    """Random bits, NaNs and infinities among them."""
    rng = np.random.default_rng(list(prompt.encode()))
    stored_as = {"float32": np.float32, "bfloat16": np.int16, "float16": np.float16}[dtype]
    pooled, sequence = (np.frombuffer(rng.bytes(4 * size), stored_as) for size in (6, 5 * 8))
    return PromptEmbedding(prompt, pooled, sequence.reshape(5, -1), dtype)


def assert_same(a: PromptEmbedding, b: PromptEmbedding) -> None:
    assert (a.prompt, a.dtype, a.pooled.dtype, a.sequence.dtype) == (
        b.prompt,
        b.dtype,
        b.pooled.dtype,
        b.sequence.dtype,
    )
    assert (a.pooled.shape, a.sequence.shape) == (b.pooled.shape, b.sequence.shape)
    assert (a.pooled.tobytes(), a.sequence.tobytes()) == (b.pooled.tobytes(), b.sequence.tobytes())


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


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, "f").add([embedding("a")])
    (part,) = (tmp_path / "f").iterdir()
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"^data\.embeddings: cannot read .*{part.name}; delete it"):
        EmbeddingStore(tmp_path, "f")


def test_another_fingerprint_sees_nothing(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, "f").add([embedding("a")])
    assert EmbeddingStore(tmp_path, "g").missing(["a"]) == ["a"]


def test_one_prompt_is_read_without_the_others(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, "f")
    store.add([embedding(p) for p in "abc"])
    (part,) = (tmp_path / "f").iterdir()
    content = bytearray(part.read_bytes())
    for other in "ac":
        at = content.index(embedding(other).sequence.tobytes())
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

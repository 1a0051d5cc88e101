"""Counts the tokens of prompts, so that a prompt that a model does not read to its end can be reported."""

from collections.abc import Callable, Mapping
from typing import Any

Counts = list[tuple[int, int]]  # tokens of a text, and how many of them are kept: one pair a call that may cut
SHAPING = ("truncation", "max_length", "padding", "return_tensors", "return_length", "return_overflowing_tokens")
SHOWN = 60  # characters of a prompt in a message


class CountingTokenizer:
    """A tokenizer or processor, as a pipeline calls it, that notes how long each text is that it may cut."""

    def __init__(self, tokenizer: Any, counts: Counts) -> None:
        self._tokenizer, self._counts = tokenizer, counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        return self._counted(self._tokenizer, text, options)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return self._counted(self._tokenizer.apply_chat_template, conversation, options)

    def _counted(self, tokenize: Callable[..., Any], text: Any, options: dict[str, Any]) -> Any:
        if options.get("truncation"):
            whole = tokenize(text, **{name: value for name, value in options.items() if name not in SHAPING})
            (ids,) = whole["input_ids"] if isinstance(text, list) else [whole["input_ids"]]  # of one prompt
            self._counts.append((len(ids), options["max_length"]))
        return tokenize(text, **options)


def count_tokens(pipeline: Any) -> Counts:
    """Make the tokenizers of a pipeline count from now on; they add to the list that is returned."""
    counts: Counts = []
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            vars(pipeline)[name] = CountingTokenizer(part, counts)  # setattr would also change the pipeline's config
    return counts


def cut_message(cut: Mapping[str, tuple[int, int]]) -> str:
    """One line about prompts that were cut: the tokens of each, and how many of them are read; "" if there is none."""
    named = (f"{prompt[:SHOWN]!r} has {tokens} tokens, {kept} are read" for prompt, (tokens, kept) in cut.items())
    return f"prompts longer than the model reads are cut: {'; '.join(named)}" if cut else ""

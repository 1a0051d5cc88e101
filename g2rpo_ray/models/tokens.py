"""Counts the tokens of prompts, to report truncated ones."""

from collections.abc import Callable, Mapping
from typing import Any

Counts = list[tuple[int, int]]  # tokens of a text, and how many of them are kept: one pair a call that may cut
SHAPING = ("truncation", "max_length", "padding", "return_tensors", "return_length", "return_overflowing_tokens")
SHOWN = 60  # characters of a prompt in a message


class CountingTokenizer:
    """A tokenizer or processor of a pipeline that records the length of each text that it may truncate."""

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
    """Makes the tokenizers of a pipeline count; returns the list to which they append."""
    counts: Counts = []
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            vars(pipeline)[name] = CountingTokenizer(part, counts)  # setattr would also change the pipeline's config
    return counts


def cut_message(cut: Mapping[str, tuple[int, int]]) -> str:
    """One line about truncated prompts, with their tokens and the number that is read; "" if there are none."""
    named = (f"{prompt[:SHOWN]!r} has {tokens} tokens, {kept} are read" for prompt, (tokens, kept) in cut.items())
    return f"prompts longer than the model's limit are truncated: {'; '.join(named)}" if cut else ""

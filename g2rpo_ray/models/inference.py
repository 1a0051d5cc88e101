"""Caches tensors that depend only on the prompt or the resolution during a unit. For inference only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from g2rpo_ray.models.base import family_of


@contextmanager
def one_prompt(transformer: nn.Module) -> Iterator[None]:
    """A context for calls of one prompt, guidance and resolution; modules that depend only on these run once."""
    family, names = family_of(transformer), {name for name, _ in transformer.named_modules()}
    stands_in: dict[str, nn.Module] = {name: _Once(transformer.get_submodule(name)) for name in family.once}
    stands_in |= {name: _OneRow(transformer.get_submodule(name)) for name in family.once_a_row if name in names}
    originals = {name: transformer.get_submodule(name) for name in stands_in}
    try:
        for name, module in stands_in.items():
            transformer.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            transformer.set_submodule(name, module)


class _Once(nn.Module):
    """Evaluates a module at the first call, and returns its result at every call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._result: Any = None

    def forward(self, x: Tensor) -> Any:
        if self._result is None:
            self._result = self._module(x)
        return self._result


class _OneRow(_Once):
    """Like `_Once`, for an input with equal rows: evaluates one row for any number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        row: Tensor = super().forward(x[:1])
        return row.expand(len(x), *row.shape[1:])

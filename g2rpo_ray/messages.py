"""Formats values and errors for messages, on one short line."""

import math
import reprlib

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 40
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 12


def shown(value: object) -> str:
    """`repr` of a value, shortened where it is long or nested."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a {type(value).__name__} too long to show"


def one_line(text: object, max_length: int = 300) -> str:
    """A text on one line, at most `max_length` characters; a state dict's error lists hundreds of keys."""
    line = " ".join(str(text).split())
    return line if len(line) <= max_length else f"{line[:max_length]} …"


def number(value: float, spec: str = ".4f") -> str:
    """A formatted number, or a dash for NaN."""
    return "–" if math.isnan(value) else format(value, spec)


def margin(half: float) -> str:
    """Formats " ± error", or a note if there is only one prompt."""
    return " (one alone: no error)" if math.isnan(half) else f" ± {half:.4f}"

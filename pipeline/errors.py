"""Errors that a user can fix."""

import difflib
import reprlib
from collections.abc import Iterable

LINE = 290
"""Most characters of a message."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200


class InputError(ValueError):
    """A user's input is wrong; the message names field, value and remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(field, value, remedy)
        self.field = field
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        """Return one line; if too long, first the value and then the remedy lose their middle."""
        field, remedy = cut(self.field, 80), " ".join(self.remedy.split())
        value = cut(_short.repr(self.value), max(80, LINE - len(field) - len(remedy) - 4))
        return f"{field}: {value}: {cut(remedy, LINE - len(field) - len(value) - 4)}"


def cut(text: str, length: int) -> str:
    """Return the text, without its middle if it is longer."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest a known name for an unknown one."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(names)}" if names else "none is defined"


class NonFiniteError(ValueError):
    """A weight, an activation or a logit is NaN or infinite; the message says where."""


class EngineDiedError(RuntimeError):
    """A generation engine died; its work may succeed on another worker."""

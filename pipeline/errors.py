"""Errors that a user can mend."""

import difflib
import reprlib
from collections.abc import Iterable

LINE = 290
"""Characters of a message at the most."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200


class InputError(ValueError):
    """Something that the user gave is wrong; the message names field, value and remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(field, value, remedy)
        self.field = field
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        """One line. What is too long loses its middle: first the value, then the remedy."""
        field, remedy = cut(self.field, 80), " ".join(self.remedy.split())
        value = cut(_short.repr(self.value), max(80, LINE - len(field) - len(remedy) - 4))
        return f"{field}: {value}: {cut(remedy, LINE - len(field) - len(value) - 4)}"


def cut(text: str, length: int) -> str:
    """The text, without its middle where it is longer."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What a person may have meant by an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(names)}" if names else "none is defined"


class NonFiniteError(ValueError):
    """A weight, an activation or a logit is NaN or infinite; the message says where."""


class EngineDiedError(RuntimeError):
    """A generation engine broke down; what it was asked for is worth another try elsewhere."""

"""Finding words that a text must not hold."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.text import read_text


def read_words(path: str) -> list[str]:
    """The words and phrases of a file, one a line; blank lines do not count.

    Raises:
        InputError: if the file cannot be read, or holds no word.
    """
    words = [word for line in read_text(path, "banned_words").split("\n") if (word := line.strip())]
    if not words:
        raise InputError("banned_words", path, "holds no word: write one a line, or leave it out")
    return words


def holding(texts: Sequence[str], words: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which texts hold one of the words as a whole word, [texts].

    Letter case, compatibility forms (NFKC) and the kind of white space make no difference. A word
    ends where a letter or digit meets something else; one that begins or ends with a wide East
    Asian character, whose scripts leave no space between words, does so there beside anything.
    """
    plain = dict.fromkeys(_plain(word) for word in words)
    patterns = {word: _whole(word) for word in plain}
    return np.array(
        [
            # The search for a plain string is quick, and seldom finds anything.
            any(word in text and pattern.search(text) for word, pattern in patterns.items())
            for text in map(_plain, texts)
        ],
        dtype=np.bool_,
    )


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def _whole(word: str) -> re.Pattern[str]:
    before = "" if _is_open(word[0]) else r"(?<!\w)"
    after = "" if _is_open(word[-1]) else r"(?!\w)"
    return re.compile(before + re.escape(word) + after)


def _is_open(character: str) -> bool:
    """Whether a word may go on beside it without being another word."""
    return unicodedata.east_asian_width(character) in "WF" or not character.isalnum()

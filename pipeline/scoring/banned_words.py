"""Banned words: their list, and the texts that contain one."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.text import read_text


def read_words(path: str) -> list[str]:
    """Read the words and phrases of a file, one a line; skip blank lines.

    Raises:
        InputError: if the file cannot be read, or holds no word.
    """
    words = [word for line in read_text(path, "banned_words").split("\n") if (word := line.strip())]
    if not words:
        raise InputError("banned_words", path, "holds no word: write one a line, or leave it out")
    return words


def contains_word(texts: Sequence[str], words: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return which texts contain one of the words as a whole word, [texts].

    Letter case, compatibility forms (NFKC) and the kind of white space make no difference. A word
    ends where a letter or digit meets another character. Wide East Asian characters are not
    separated by spaces, so a word that begins or ends with one is found there beside anything.
    """
    patterns = {word: _whole_word(word) for word in map(_normalised, words)}
    return np.array(
        [
            # The search for a plain string is fast and rarely finds anything.
            any(word in text and pattern.search(text) for word, pattern in patterns.items())
            for text in map(_normalised, texts)
        ],
        dtype=np.bool_,
    )


def _normalised(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def _whole_word(word: str) -> re.Pattern[str]:
    before = "" if _needs_no_boundary(word[0]) else r"(?<!\w)"
    after = "" if _needs_no_boundary(word[-1]) else r"(?!\w)"
    return re.compile(before + re.escape(word) + after)


def _needs_no_boundary(character: str) -> bool:
    """Return whether a word that ends with it is whole beside any character."""
    return unicodedata.east_asian_width(character) in "WF" or not character.isalnum()

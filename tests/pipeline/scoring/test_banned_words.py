from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.scoring.banned_words import contains_word, read_words


def held(text: str, *words: str) -> bool:
    return bool(contains_word([text], words)[0])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a bad one", "bad"),
        ("Bad", "bad"),
        ("it is BAD.", "bad"),
        ("bad-tempered", "bad"),
        ("not «bad», no", "bad"),
        ("die Straße", "STRASSE"),
        ("das Café", "cafe\u0301"),
        ("ein übler Kerl", "ÜBLER"),
        ("a very  bad\nword", "very bad word"),
        ("ｂａｄ", "bad"),
        ("это плохо!", "Плохо"),
        ("これは悪い言葉です", "悪い言葉"),
        ("use c++ here", "C++"),
        ("badly and then bad", "bad"),
    ],
)
def test_a_word_is_found_in_any_case_form_and_script(text: str, word: str) -> None:
    assert held(text, word)
    assert held(text, "absent", word)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("badly", "bad"),
        ("forbade", "bad"),
        ("bad2", "bad"),
        ("bad_name", "bad"),
        ("a very, bad word", "very bad"),
        ("неплохо", "плохо"),
        ("", "bad"),
        ("a.b", "a?b"),
    ],
)
def test_a_part_of_another_word_is_not_the_word(text: str, word: str) -> None:
    assert not held(text, word)


def test_each_text_has_a_flag_of_its_own() -> None:
    assert contains_word(["good", "bad", "worse", "Bad"], ["bad", "worse"]).tolist() == [
        False,
        True,
        True,
        True,
    ]


def test_a_list_has_a_word_a_line_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text(" bad \n\nvery bad\n", encoding="utf-8")
    assert read_words(str(path)) == ["bad", "very bad"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n  \n", "holds no word"), (b"\xff\xfe\x00", "is UTF-16")]
)
def test_a_file_without_words_or_of_another_encoding_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"banned_words: .*{message}"):
        read_words(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        read_words(str(tmp_path))

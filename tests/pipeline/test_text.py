"""Reading text files as people save them, and the errors for others."""

import gzip
import io
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.text import check_characters, lines, read_text


def lines_of(content: bytes) -> list[str]:
    return list(lines(io.BytesIO(content), "a.txt"))


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        ("\ufeffone\r\ntwo\r\n".encode(), ["one", "two"]),  # as Windows saves it
        (b"one\rtwo", ["one", "two"]),
        ("\ufeffone\n\ufefftwo\n".encode(), ["one", "two"]),  # two such files joined
        ("a\u2028b\x85c\x0cd\x0be\nf".encode(), ["a\u2028b\x85c\x0cd\x0be", "f"]),
        (b"\n\na\n", ["", "", "a"]),
        (b"", []),
    ],
)
def test_lines_end_at_line_ends_alone_and_byte_order_marks_are_no_text(
    content: bytes, read: list[str]
) -> None:
    assert lines_of(content) == read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("good\nb\u00e9\n".encode() + "caf\u00e9".encode("latin-1"), "a.txt, line 3, byte 4.*xe9"),
        (b"good\n\xed\xa0\xbd\n", "a.txt, line 2, byte 1.*not UTF-8"),  # a surrogate's three bytes
        (b"good\nno\0t\n", "a.txt, line 2, byte 3.*not UTF-8"),
        ("text".encode("utf-16"), "a.txt': is UTF-16 text: save it as UTF-8"),
        ("text".encode("utf-16-be"), "line 1, byte 1.*not UTF-8"),
        ("text".encode("utf-32"), "is UTF-16 text: save it as UTF-8"),
        (gzip.compress(b"text\n" * 99, mtime=0), r"is a gzip file: its name must end in \.gz"),
    ],
)
def test_text_that_is_not_utf8_is_refused_with_file_line_and_byte(
    content: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        lines_of(content)


def test_half_of_a_surrogate_pair_is_named_and_a_whole_character_passes() -> None:
    check_characters("\U0001f600 and \ufeff", "path", "a.jsonl, line 1")
    with pytest.raises(InputError, match=r"a\.jsonl, line 1': holds \\ud83d, half of a surrogate"):
        check_characters("cut \ud83d", "path", "a.jsonl, line 1")


def test_a_file_that_cannot_be_read_is_an_error_that_names_field_and_path(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for wrong, message in ((path, "there is no such file"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=f"^grid: '{wrong}': .*{message}"):
            read_text(str(wrong), "grid")
    path.write_bytes(b"\xef\xbb\xbfname: a\r\nnote: b\r\n")
    assert read_text(str(path), "grid") == "name: a\nnote: b\n"

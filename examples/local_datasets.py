"""Write small stand-ins for the data sets of the paper suite, in their real schema.

    python examples/local_datasets.py FOLDER [--questions 200]

Each data set has the folder `FOLDER/<owner>/<name>`, as on the hub, so lm-eval's own tasks run on
them: `cd FOLDER && lm_eval --tasks boolq ...`. Questions are random words with random answers, so
every model scores at chance. Use `huggingface_hub.snapshot_download` instead of this script to fill
the same folders with the real data.
"""

import argparse
import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_Row = dict[str, Any]

WORDS = """
the a ship sails over seven seas while captain counts stars and every sailor knows that deep water
keeps old names of small islands where birds rest before long winter nights begin
"""

SUBJECTS = """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
college_chemistry college_computer_science college_mathematics college_medicine college_physics
computer_security conceptual_physics econometrics electrical_engineering elementary_mathematics
formal_logic global_facts high_school_biology high_school_chemistry high_school_computer_science
high_school_european_history high_school_geography high_school_government_and_politics
high_school_macroeconomics high_school_mathematics high_school_microeconomics high_school_physics
high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning
management marketing medical_genetics miscellaneous moral_disputes moral_scenarios nutrition
philosophy prehistory professional_accounting professional_law professional_medicine
professional_psychology public_relations security_studies sociology us_foreign_policy virology
world_religions
"""


def text(draws: random.Random, fewest: int, most: int) -> str:
    """Return between `fewest` and `most` random words."""
    return " ".join(draws.choices(WORDS.split(), k=draws.randint(fewest, most)))


def boolq(draws: random.Random, number: int) -> _Row:
    """Return a row of BoolQ in SuperGLUE."""
    return {
        "question": text(draws, 4, 9),
        "passage": text(draws, 20, 40),
        "idx": number,
        "label": draws.randrange(2),
    }


def winogrande(draws: random.Random, number: int) -> _Row:
    """Return a row of WinoGrande."""
    return {
        "sentence": f"{text(draws, 4, 9)} _ {text(draws, 3, 6)}.",
        "option1": draws.choice(WORDS.split()),
        "option2": text(draws, 2, 2),
        "answer": draws.choice("12"),
    }


def piqa(draws: random.Random, number: int) -> _Row:
    """Return a row of PIQA."""
    return {
        "goal": text(draws, 4, 9),
        "sol1": text(draws, 3, 9),
        "sol2": text(draws, 3, 9),
        "label": draws.randrange(2),
    }


def hellaswag(draws: random.Random, number: int) -> _Row:
    """Return a row of HellaSwag."""
    first, second = text(draws, 5, 12), text(draws, 1, 4)
    return {
        "ind": number,
        "activity_label": text(draws, 1, 3),
        "ctx_a": first,
        "ctx_b": second,
        "ctx": f"{first} {second}",
        "endings": [text(draws, 3, 12) for _ in range(4)],
        "source_id": f"activitynet~{number}",
        "split": "val",
        "split_type": "indomain",
        "label": draws.choice("0123"),
    }


def arc(draws: random.Random, number: int) -> _Row:
    """Return a row of ARC, easy or challenge."""
    labels = draws.choice((["A", "B", "C", "D"], ["1", "2", "3", "4"]))
    return {
        "id": f"question-{number}",
        "question": f"{text(draws, 5, 14)}?",
        "choices": {"text": [text(draws, 1, 5) for _ in labels], "label": labels},
        "answerKey": draws.choice(labels),
    }


def mmlu(subject: str) -> Callable[[random.Random, int], _Row]:
    """Return a function that makes rows of MMLU on a subject."""

    def question(draws: random.Random, number: int) -> _Row:
        return {
            "question": f"{text(draws, 4, 9)}?",
            "subject": subject,
            "choices": [text(draws, 1, 3) for _ in range(4)],
            "answer": draws.randrange(4),
        }

    return question


def wikitext_line(draws: random.Random, number: int) -> _Row:
    """Return a line of WikiText-2: headings, blank lines and paragraphs take turns."""
    kinds = (f" = {text(draws, 1, 3)} = \n", "", f" {text(draws, 30, 90)} . \n")
    return {"text": kinds[number % 3]}


def wikitext_page(draws: random.Random, number: int) -> _Row:
    """Return an article of WikiText-2."""
    return {"page": f" = {text(draws, 1, 3)} = \n\n {text(draws, 60, 200)} . \n"}


def alpaca(draws: random.Random, number: int) -> _Row:
    """Return a row of Alpaca with answers of GPT-4."""
    instruction, output = text(draws, 4, 12), text(draws, 10, 60)
    return {
        "instruction": instruction,
        "input": "",
        "output": output,
        "text": f"Below is an instruction.\n\n### Instruction:\n{instruction}\n\n"
        f"### Response:\n{output}",
    }


def datasets(
    questions: int, subjects: list[str]
) -> Iterator[tuple[str, str, dict[str, tuple[Any, int]]]]:
    """Yield data set, configuration, and the row maker and number of rows of each split."""

    def usual(make: Any, *splits: str) -> dict[str, tuple[Any, int]]:
        return {"train": (make, 8), **dict.fromkeys(splits, (make, questions))}

    yield "aps/super_glue", "boolq", usual(boolq, "validation", "test")
    yield "allenai/winogrande", "winogrande_xl", usual(winogrande, "validation")
    yield "baber/piqa", "plain_text", usual(piqa, "validation")
    yield "Rowan/hellaswag", "default", usual(hellaswag, "validation")
    yield "allenai/ai2_arc", "ARC-Easy", usual(arc, "validation", "test")
    yield "allenai/ai2_arc", "ARC-Challenge", usual(arc, "validation", "test")
    for subject in subjects:
        make = mmlu(subject)
        few = max(2, questions // len(subjects))
        yield "cais/mmlu", subject, {"test": (make, few), "validation": (make, 2), "dev": (make, 5)}
    lines = dict.fromkeys(("train", "validation", "test"), (wikitext_line, 60))
    yield "Salesforce/wikitext", "wikitext-2-raw-v1", lines
    pages = dict.fromkeys(("train", "validation", "test"), (wikitext_page, 8))
    yield "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", pages
    yield "vicgalle/alpaca-gpt4", "default", {"train": (alpaca, 60)}


def write_datasets(folder: Path, questions: int = 200, subjects: list[str] | None = None) -> None:
    """Write all data sets below a folder, with all or some of MMLU's subjects."""
    configurations: dict[str, list[str]] = {}
    for name, configuration, splits in datasets(questions, subjects or SUBJECTS.split()):
        lines = [f"- config_name: {configuration}", "  data_files:"]
        for split, (make, count) in splits.items():
            draws = random.Random(f"{name} {configuration} {split}")
            path = Path(configuration, f"{split}-00000-of-00001.parquet")
            target = folder / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            rows = [make(draws, number) for number in range(count)]
            pq.write_table(pa.Table.from_pylist(rows), target)
            lines += [f"  - split: {split}", f"    path: {path}"]
        configurations.setdefault(name, []).extend(lines)
    for name, lines in configurations.items():
        write_card(folder / name, lines)
    write_c4(folder / "allenai" / "c4")


def write_card(folder: Path, lines: list[str]) -> None:
    """Write the card from which `datasets` reads the files of each configuration."""
    (folder / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))


def write_c4(folder: Path) -> None:
    """Write C4 as compressed JSON Lines, which are found by their file names."""
    (folder / "en").mkdir(parents=True, exist_ok=True)
    lines = ["- config_name: en", "  data_files:"]
    for split in ("train", "validation"):
        lines += [f"  - split: {split}", f"    path: en/c4-{split}.*.json.gz"]
    write_card(folder, lines)
    for name in ("c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"):
        draws = random.Random(name)
        rows = [
            {
                "text": text(draws, 40, 160),
                "timestamp": "2019-04-25T12:57:54Z",
                "url": f"https://example.org/{number}",
            }
            for number in range(40)
        ]
        with gzip.GzipFile(folder / "en" / name, "wb", mtime=0) as packed:
            packed.write("".join(json.dumps(row) + "\n" for row in rows).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=200, help="in each task")
    chosen = parser.parse_args()
    write_datasets(chosen.folder, chosen.questions)

"""Which calibration data keeps which language of a bilingual model."""

import pandas as pd

from analysis.charts import interval_figure
from analysis.evidence import (
    SOURCE,
    calibrated,
    corrected,
    estimate_rows,
    paired,
    scored,
)
from analysis.load import TableError
from analysis.study import Answer, Results, Study

BOTH, GENERATED, HELD_OUT = "both", "self-generated-", "-heldout"


def answer(results: Results) -> Answer:
    """Compare calibration in a language, in the other, in both, and self-generated."""
    table = results.table
    both = languages(table)
    rows = calibrated(
        pd.concat(
            [
                scored(table, language + HELD_OUT, "perplexity").assign(language=language)
                for language in both
            ]
        )
    )

    def chosen(of: str, prefix: str = "", other: bool = False) -> pd.DataFrame:
        """Return the rows that measure language `of`, calibrated in it or in the other."""
        named = both[1 - both.index(of)] if other else of
        return rows[(rows["language"] == of) & (rows["calibration"] == prefix + named)]

    def over_both(prefix: str = "", other: bool = False) -> pd.DataFrame:
        return pd.concat([chosen(language, prefix, other) for language in both])

    mixed = rows[rows["calibration"] == BOTH]
    main = paired(over_both(), over_both(other=True), SOURCE)
    secondary = corrected(
        {
            "both languages against its own": paired(mixed, over_both(), SOURCE),
            "both languages against the other": paired(mixed, over_both(other=True), SOURCE),
            "self-generated from it, against its own text": paired(
                over_both(GENERATED), over_both(), SOURCE
            ),
            "self-generated from the other, against the other's text": paired(
                over_both(GENERATED, True), over_both(other=True), SOURCE
            ),
            "self-generated from it, against from the other": paired(
                over_both(GENERATED), over_both(GENERATED, True), SOURCE
            ),
        }
    )
    panels = {}
    for language in both:
        reference = chosen(language)
        parts = {
            f"{both[1 - both.index(language)]} text": chosen(language, other=True),
            "text of both": mixed[mixed["language"] == language],
            f"self-generated from {language}": chosen(language, GENERATED),
            "self-generated from the other": chosen(language, GENERATED, other=True),
        }
        panels[f"perplexity of {language}"] = corrected(
            {name: paired(part, reference, SOURCE) for name, part in parts.items()}
        )
    if main.shown:
        better = "better" if main.helps else "worse"
        what = f"Calibration in a language keeps it {better} than calibration in the other."
    else:
        what = "It is not shown that calibration in a language keeps it better than in the other."
    size = f"Its own language against the other: {main.text}."
    certainty = "Secondary (Holm): " + "; ".join(
        f"{name}, {each.text}" + ("" if each.shown else ", not shown")
        for name, each in secondary.items()
    )
    caveat = (
        "The two languages have unequal shares of the pretraining text, and effects are averaged "
        "over both: the figure shows each."
    )
    figure = interval_figure(
        "Perplexity after pruning, against calibration with the language's own text",
        panels,
        "change against its own language's text (%)",
    )
    effects = {"own language against the other": main, **secondary}
    for panel, estimates in panels.items():
        effects |= {f"{panel}: {name} against its own": each for name, each in estimates.items()}
    return Answer(what, size, certainty + ".", caveat, figure, estimate_rows(effects))


def languages(table: pd.DataFrame) -> list[str]:
    """Return the two languages whose held-out text a grid measures, by name.

    Raises:
        TableError: if there are not exactly two.
    """
    measures = sorted({str(task) for task in table["task"] if str(task).endswith(HELD_OUT)})
    if len(measures) != 2:
        raise TableError(f"measures {measures}: two are needed, each a language and {HELD_OUT}")
    return [measure.removesuffix(HELD_OUT) for measure in measures]


STUDY = Study(
    "language",
    "Which calibration data keeps which language of a model that has two?",
    "calibration in a language against calibration in the other, for that language's text",
    answer,
)

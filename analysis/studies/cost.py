"""When the device-seconds spent on self-generation pay off."""

import pandas as pd

from analysis.charts import Point, point_figure
from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study

SECONDS = ["seconds_generate", "seconds_score", "seconds_prune"]


def answer(results: Results) -> Answer:
    """Judge generated sets against the corpus, and put the device-seconds beside the gains."""
    title = "Perplexity after pruning, by device-seconds"
    found = declared_answer(
        results,
        title,
        "Seconds are those of this run's machine, summed over shards; a set that many prunings "
        "share costs each a fraction of its own. Generation with a large model takes much longer "
        "than its pruning, unless an engine batches well.",
    )
    assert results.design is not None  # or there is no answer
    contrasts = results.design.contrasts
    by_cell = results.table.drop_duplicates("cell").set_index("cell")[SECONDS].sum(axis=1)
    spent = {
        name: tuple(
            float(by_cell[[str(pair[side]) for pair in each.pairs]].median()) for side in (0, 1)
        )
        for name, each in contrasts.items()
    }
    texts = [f"{name}: {own:.1f} against {other:.1f}" for name, (own, other) in spent.items()]
    sides = pd.DataFrame(spent, index=["seconds", "seconds_against"]).T
    numbers = found.numbers.join(sides, on="what")
    main = next(iter(contrasts.values())).family
    rows = [numbers[numbers["what"] == name].iloc[0] for name in contrasts]
    rows = [row for row in rows if contrasts[row["what"]].family == main]
    points = [
        Point(row["what"].partition(" against")[0], *row[["seconds", "effect", "low", "high"]])
        for row in rows
    ]
    corpus = Point("the corpus", rows[0]["seconds_against"], 0.0)
    figure = point_figure(
        title,
        {"": [corpus, *points]},
        "device-seconds of the data and one pruning (log scale)",
        "change against the corpus (%)",
        f"Bars: simultaneous 95 % intervals over {rows[0]['models']:.0f} models.",
    )
    certainty = f"{found.certainty} Device-seconds of data and pruning, {'; '.join(texts)}."
    return found._replace(certainty=certainty, figure=figure, numbers=numbers)


STUDY = Study(
    "cost",
    "When do the device-seconds spent on self-generation pay off?",
    "generated sets of three sizes against the mismatched corpus",
    answer,
)

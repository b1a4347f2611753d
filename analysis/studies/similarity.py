"""The paper's central claim: the nearer calibration data is to the pretraining data, the better."""

import pandas as pd

from analysis.charts import Curve, line_figure
from analysis.evidence import (
    calibrated,
    corrected,
    estimate_rows,
    listed,
    paired,
    scored,
    slope,
    trailing_number,
)
from analysis.labels import in_order, targets_in_order
from analysis.load import TableError
from analysis.study import Answer, Study


def answer(table: pd.DataFrame) -> Answer:
    """The trend over the share of unseen text, and each share against none."""
    rows = calibrated(scored(table))
    rows = rows.assign(share=[trailing_number(name) for name in rows["calibration"]])
    shares = sorted(set(rows["share"]))
    if len(shares) < 3 or shares[0] != 0:
        raise TableError(f"shares of unseen text {shares}: it takes 0 and two others")
    true = rows[rows["share"] == 0]
    across = ["calibration", "share"]
    main = slope(rows, "share", ["calibration"], per=10.0)
    by_share = corrected(
        {share: paired(rows[rows["share"] == share], true, across) for share in shares if share > 0}
    )
    unseen = rows[rows["share"] == shares[-1]]
    extremes = corrected(
        {
            method: paired(unseen[unseen["method"] == method], true, across)
            for method in in_order(rows["method"])
        }
    )
    panels, effects = {}, {"trend, by 10 points": main}
    effects |= {f"{share:g} % unseen": each for share, each in by_share.items()}
    for method in in_order(rows["method"]):
        lines = []
        for target in targets_in_order(rows):
            part = rows[(rows["method"] == method) & (rows["target"] == target)]
            curve = {share: paired(part[part["share"] == share], true, across) for share in shares}
            lines.append(Curve(target, shares, list(curve.values())))
            effects |= {f"{share:g} % unseen, {method}, {target}": e for share, e in curve.items()}
        panels[method] = lines
    if main.shown:
        better = "worse" if not main.helps else "better"
        what = f"The more unseen text calibration data holds, the {better} it prunes."
    else:
        what = "That calibration data prunes worse with more unseen text in it is not shown."
    size = (
        f"By 10 points of unseen text: {main.text}; all of it against none: "
        f"{by_share[shares[-1]].text}; by pruner "
        + listed([f"{method} {each.text}" for method, each in extremes.items()])
        + "."
    )
    told = [share for share, each in by_share.items() if each.shown]
    certainty = (
        f"Taken singly (Holm), these shares differ from none: "
        f"{listed([f'{share:g} %' for share in told])}; the smallest, {told[0]:g} %, by "
        f"{by_share[told[0]].text}."
        if told
        else "Taken singly (Holm), no share differs from none."
    )
    caveat = (
        "The unseen text is of a kind that the model never saw at all; a corpus that differs from "
        "the pretraining text only in proportions is nearer, and its harm smaller."
    )
    figure = line_figure(
        "Perplexity after pruning, by the share of unseen text in the calibration data",
        panels,
        "unseen text (%)",
        "change against none (%)",
    )
    return Answer(what, size, certainty, caveat, figure, estimate_rows(effects))


STUDY = Study(
    "similarity",
    "Does calibration data prune better, the nearer it is to the pretraining data?",
    "the trend over the share of text of unseen kinds",
    answer,
)

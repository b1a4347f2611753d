"""The paper's central claim: calibration data nearer to the pretraining data prunes better."""

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
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Estimate the trend over the share of unseen text, and compare each share with none."""
    rows = calibrated(scored(results.table))
    rows = rows.assign(share=[trailing_number(name) for name in rows["calibration"]])
    shares = sorted(set(rows["share"]))
    if len(shares) < 3 or shares[0] != 0:
        raise TableError(f"shares of unseen text {shares}: 0 and two others are needed")
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
        better = "better" if main.helps else "worse"
        what = f"The more unseen text calibration data holds, the {better} it prunes."
    else:
        what = "It is not shown that calibration data prunes worse with more unseen text in it."
    size = (
        f"By 10 points of unseen text: {main.text}; all of it against none: "
        f"{by_share[shares[-1]].text}; by pruner "
        + listed([f"{method} {each.text}" for method, each in extremes.items()])
        + "."
    )
    shown = [share for share, each in by_share.items() if each.shown]
    certainty = (
        f"Taken singly (Holm), these shares differ from none: "
        f"{listed([f'{share:g} %' for share in shown])}; the smallest, {shown[0]:g} %, by "
        f"{by_share[shown[0]].text}."
        if shown
        else "Taken singly (Holm), no share differs from none."
    )
    caveat = (
        "The model never saw text of the unseen kinds. A corpus that differs from the pretraining "
        "text only in proportions is nearer to it, and harms less."
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

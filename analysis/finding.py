"""The finding of a study whose grid declares its contrasts: written from the verdicts alone."""

from collections.abc import Mapping

import pandas as pd

from analysis.best import Ranking, rank_choices
from analysis.charts import interval_figure
from analysis.contrasts import Judgement, Verdict, judge
from analysis.evidence import EffectEstimate, listed
from analysis.load import TableError
from analysis.study import Answer, Results

VERDICTS: dict[Verdict, str] = {
    "worse": "Worse",
    "better": "Better",
    "equivalent": "Equal within the smallest effect of interest",
    "not shown": "Not shown",
    "not usable": "Of no use on either side",
}
"""In the order of a finding."""


def declared_answer(results: Results, title: str, caveat: str) -> Answer:
    """Return the finding of a declared design.

    The first contrast's family is the main one; the others are secondary.

    Args:
        results: of a grid with a design.
        title: title of the figure.
        caveat: what could change the answer.

    Raises:
        TableError: if the design is not in the store, or results are missing.
    """
    if results.design is None:
        raise TableError("its design is not in the store")
    judged = judge(results.table, results.design, results.requests)
    rankings = rank_choices(results.table, results.design, results.requests)
    families: dict[str, dict[str, Judgement]] = {}
    for name, contrast in results.design.contrasts.items():
        families.setdefault(contrast.family, {})[name] = judged[name]
    reach = next(iter(judged.values())).reach
    always = set.intersection(*(set(each.remarks) for each in judged.values()))
    families = {
        family: {name: _without(each, always) for name, each in own.items()}
        for family, own in families.items()
    }
    main, *others = families.values()
    certainty = f"Intervals are over {'; '.join([reach, *sorted(always)])}; those of a family hold "
    certainty += " ".join(["together.", *_sets(rankings)])
    figure = interval_figure(
        title,
        {
            name: {each: as_estimate(one) for each, one in own.items()}
            for name, own in families.items()
        },
        f"Bars: 95 % intervals over {reach}, simultaneous in a panel. Circles: the better side; "
        "squares: the worse. Filled: a verdict of better, worse or equal; hollow: none.",
    )
    return Answer(
        what=_verdicts(main),
        size=_texts(main),
        certainty=certainty,
        caveat=f"{caveat} {results.design.history}",
        figure=figure,
        numbers=judgement_rows(judged, rankings),
        secondary=" ".join(_texts(family) for family in others),
    )


def as_estimate(judgement: Judgement) -> EffectEstimate:
    """Return what a figure shows of a judgement."""
    effect, low, high = judgement.estimate[:3]
    shown = judgement.verdict in ("better", "worse", "equivalent")
    return EffectEstimate(effect, low, high, shown, judgement.kind)


def judgement_rows(
    judged: Mapping[str, Judgement], rankings: Mapping[str, Ranking]
) -> pd.DataFrame:
    """Return one row per contrast, and per candidate of a choice."""
    contrasts = [
        {
            "what": name,
            "verdict": each.verdict,
            **each.estimate._asdict(),
            "unit": each.kind.unit,
            "level": each.levels[0],
            "level_against": each.levels[1],
            "level_dense": each.levels[2],
            "models": each.models,
            "draws": each.draws,
            "family_size": each.family,
            "remarks": "; ".join(each.remarks),
        }
        for name, each in judged.items()
    ]
    candidates = [
        {
            "what": f"{name}: {each.name} against the best other",
            "verdict": "possibly best" if each.possibly_best else "not best",
            "effect": each.loss,
            "low": each.low,
            "high": each.high,
            "level": each.level,
            "models": ranking.models,
        }
        for name, ranking in rankings.items()
        for each in ranking.candidates
    ]
    return pd.DataFrame([*contrasts, *candidates])


def _verdicts(judged: Mapping[str, Judgement]) -> str:
    by_verdict = {
        words: [name for name, each in judged.items() if each.verdict == verdict]
        for verdict, words in VERDICTS.items()
    }
    return " ".join(f"{words}: {listed(names)}." for words, names in by_verdict.items() if names)


def _texts(judged: Mapping[str, Judgement]) -> str:
    return " ".join(f"{name[:1].upper()}{name[1:]}: {each.text}." for name, each in judged.items())


def _without(judgement: Judgement, remarks: set[str]) -> Judgement:
    own = tuple(remark for remark in judgement.remarks if remark not in remarks)
    return judgement._replace(remarks=own)


def _sets(rankings: Mapping[str, Ranking]) -> list[str]:
    return [
        f"The best {name} is, with 95 % confidence, {' or '.join(ranking.possibly_best)}"
        + (f"; {listed(ranking.left_out)} failed" if ranking.left_out else "")
        + "."
        for name, ranking in rankings.items()
    ]

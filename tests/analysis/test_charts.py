import itertools
import math

import numpy as np
from matplotlib.text import Annotation

from analysis.charts import LABEL_GAP, Curve, Point, interval_figure, line_figure, point_figure
from analysis.evidence import EffectEstimate
from analysis.figures import svg_bytes
from analysis.metrics import metric_named

KIND = metric_named("perplexity")


def effect(value: float, p: float = 0.01) -> EffectEstimate:
    return EffectEstimate(value, value - 1, value + 1, p, 4, KIND)


def test_lines_are_named_at_their_ends_and_no_two_names_overlap() -> None:
    lines = [Curve(f"source {n}", [0, 1], [effect(0), effect(n / 100)]) for n in range(6)]
    figure = line_figure("title", {"all": lines}, "x", "y")
    labels = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    assert {text.get_text() for text in labels} == {line.name for line in lines}
    places = sorted(text.xyann[1] for text in labels)
    assert all(b - a > 0.99 * LABEL_GAP for a, b in itertools.pairwise(places))


def test_on_a_logarithmic_scale_names_stand_at_the_height_of_their_lines() -> None:
    lines = [
        Curve(name, [0, 1], [effect(1000), effect(end)]) for name, end in (("a", 0), ("b", 99))
    ]
    figure = line_figure("title", {"all": lines}, "x", "y", linear_within=1.0)
    (axes,) = figure.axes
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    drawn = {text.get_text(): axes.transAxes.transform(text.xyann)[1] for text in labels}
    for name, end in (("a", 0), ("b", 99)):
        assert abs(drawn[name] - axes.transData.transform((1, end))[1]) < 1  # pixel
    assert drawn["b"] - drawn["a"] > 50
    assert any("logarithmic beyond ±1" in " ".join(t.get_text().split()) for t in figure.texts)


def test_a_line_is_broken_where_a_named_place_is_left_out() -> None:
    line = Curve("source", [0, 1, 3], [effect(1), effect(2), effect(3)])
    ticks = {0: "30 %", 1: "50 %", 3: "2:4"}
    figure = line_figure("title", {"all": [line]}, "x", "y", ticks)
    drawn = [each.get_ydata() for each in figure.axes[0].lines if len(each.get_ydata()) > 2]
    assert np.array_equal(drawn[0], [1, 2, math.nan, 3], equal_nan=True)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == list(ticks.values())


def test_what_is_shown_is_filled_and_what_is_not_is_hollow() -> None:
    panels = {"all": {"sure": effect(-3), "open": effect(2, p=0.4)}}
    figure = interval_figure("title", panels, "x")
    points = [line for line in figure.axes[0].lines if line.get_marker() in ("o", "s")]
    assert [point.get_marker() for point in points] == ["o", "s"]  # helps, harms
    assert points[0].get_markerfacecolor() == points[0].get_color()
    assert points[1].get_markerfacecolor() == "white"


def test_equal_points_give_equal_bytes() -> None:
    points = [Point("a", 1.0, 2.0, 1.0, 3.0, "wanda"), Point("b", 10.0, -2.0, group="ria")]
    drawn = [svg_bytes(point_figure("title", {"all": points}, "x", "y")) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_names_of_neighbouring_points_do_not_overlap() -> None:
    points = [
        Point("24 samples", 1.0, 0.0),
        Point("192 samples", 5.1, 9.9),
        Point("96 samples", 5.0, 10.0),
    ]
    figure = point_figure("title", {"all": points}, "x", "y")
    labels = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    extents = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(extents, 2))
    below = [label.get_text() for label in labels if label.xyann[1] < 0]
    assert below == ["192 samples"]


def test_no_name_lies_over_its_points_interval() -> None:
    points = [Point("24 samples", 1.0, 0.0, -2.0, 3.0), Point("96 samples", 1.1, -1.0, -3.0, 2.5)]
    figure = point_figure("title", {"all": points}, "x", "y")
    (axes,) = figure.axes
    for label, point in zip(axes.texts, points, strict=True):
        box = label.get_window_extent()
        low, high = axes.transData.transform([(point.x, point.low), (point.x, point.high)])[:, 1]
        assert box.y0 > high or box.y1 < low

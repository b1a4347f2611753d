import itertools

from matplotlib.text import Annotation

from analysis.charts import Point, interval_figure, point_figure
from analysis.evidence import EffectEstimate
from analysis.figures import svg_bytes
from analysis.metrics import metric_named

KIND = metric_named("perplexity")


def effect(value: float, shown: bool) -> EffectEstimate:
    return EffectEstimate(value, value - 1, value + 1, shown, KIND)


def test_what_is_shown_is_filled_and_what_is_not_is_hollow() -> None:
    panels = {"all": {"sure": effect(-3, shown=True), "open": effect(2, shown=False)}}
    figure = interval_figure("title", panels, "note")
    points = [line for line in figure.axes[0].lines if line.get_marker() in ("o", "s")]
    assert [point.get_marker() for point in points] == ["o", "s"]  # helps, harms
    assert points[0].get_markerfacecolor() == points[0].get_color()
    assert points[1].get_markerfacecolor() == "white"


def test_only_panels_of_one_unit_share_a_scale() -> None:
    small = EffectEstimate(0.02, 0.01, 0.03, True, metric_named("kl"))
    panels = {"far": {"a": effect(50, True)}, "near": {"b": effect(2, True)}, "KL": {"c": small}}
    far, near, divergence = interval_figure("title", panels, "note").axes
    assert far.get_xlim() == near.get_xlim()
    assert divergence.get_xlim()[1] < 0.1
    labels = [panel.get_xlabel() for panel in (far, near, divergence)]
    assert labels == ["change (%)", "change (%)", "change"]


def test_equal_points_give_equal_bytes() -> None:
    points = [Point("a", 1.0, 2.0, 1.0, 3.0), Point("b", 10.0, -2.0)]
    drawn = [svg_bytes(point_figure("title", {"all": points}, "x", "y", "note")) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_names_of_neighbouring_points_do_not_overlap() -> None:
    points = [
        Point("24 samples", 1.0, 0.0),
        Point("192 samples", 5.1, 9.9),
        Point("96 samples", 5.0, 10.0),
    ]
    figure = point_figure("title", {"all": points}, "x", "y", "note")
    labels = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    extents = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(extents, 2))
    below = [label.get_text() for label in labels if label.xyann[1] < 0]
    assert below == ["192 samples"]


def test_no_name_lies_over_its_points_interval() -> None:
    points = [Point("24 samples", 1.0, 0.0, -2.0, 3.0), Point("96 samples", 1.1, -1.0, -3.0, 2.5)]
    figure = point_figure("title", {"all": points}, "x", "y", "note")
    (axes,) = figure.axes
    for label, point in zip(axes.texts, points, strict=True):
        box = label.get_window_extent()
        low, high = axes.transData.transform([(point.x, point.low), (point.x, point.high)])[:, 1]
        assert box.y0 > high or box.y1 < low

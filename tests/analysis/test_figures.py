import itertools
import re

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from analysis.figures import appearances, png_bytes, sparsity_figure, svg_bytes
from analysis.load import TableError
from analysis.statistics import summarize
from tests.analysis.conftest import DENSE, MAGNITUDE, MakeTable

LOST = "Not shown: 1 of 53 cells, which failed. Not shown: 1 of 53 cells, which did not run yet."


@pytest.fixture(scope="module")
def figure(table: pd.DataFrame) -> Figure:
    return sparsity_figure(table, "tiny", "heldout", "perplexity")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def legend_names(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bars(figure: Figure, panel: int) -> dict[str, list[tuple[float, float]]]:
    """Return the horizontal positions and the means of each source's points."""
    found = [each for each in figure.axes[panel].containers if isinstance(each, ErrorbarContainer)]
    return {
        name: list(zip(*each.lines[0].get_data(), strict=True))
        for name, each in zip(legend_names(figure), found, strict=False)
    }


def undrawn_labels(figure: Figure) -> list[Text]:
    """Return labels of ticks beyond an axis's ends, which matplotlib keeps but does not draw."""
    return [
        tick.label1
        for panel in figure.axes
        for axis in (panel.xaxis, panel.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Return overlapping pairs of texts, panels and the legend, and what is cut off."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    legend = figure.legends[0]
    inside = {*legend.findobj(Text), *figure.findobj(Annotation), *undrawn_labels(figure)}
    boxes = {
        f"{number} {text.get_text()}": text.get_window_extent(renderer)
        for number, text in enumerate(figure.findobj(Text))
        if text.get_visible() and text.get_text().strip() and text not in inside
    }
    boxes |= {
        f"panel {number}": panel.get_window_extent(renderer)
        for number, panel in enumerate(figure.axes)
        if panel.get_visible()
    }
    boxes["legend"] = legend.get_window_extent(renderer)
    whole = figure.bbox
    cut = [
        (name, "cut off")
        for name, box in boxes.items()
        if box.x0 < whole.x0 or box.y0 < whole.y0 or box.x1 > whole.x1 or box.y1 > whole.y1
    ]
    return cut + [
        (one, other)
        for (one, first), (other, second) in itertools.combinations(boxes.items(), 2)
        if first.overlaps(second)
    ]


def test_each_pruner_with_data_has_a_panel(figure: Figure) -> None:
    assert [panel.get_title("left") for panel in figure.axes] == ["wanda", "sparsegpt"]


def test_the_legend_names_calibrations_and_references(figure: Figure) -> None:
    assert legend_names(figure) == [
        "mismatched",
        "pretraining",
        "self-generated",
        "magnitude (no data)",
        "dense model",
    ]


def test_labels_state_units_direction_bars_and_lost_cells(figure: Figure) -> None:
    written = " ".join(" ".join(texts(figure)).split())
    assert "perplexity per token on heldout (log scale, lower is better)" in written
    assert "sparsity (% of pruned weights that are zero), or N:M pattern" in written
    assert "bars: ± standard deviation" in written
    assert LOST in written


def test_perplexity_is_on_a_log_scale_and_accuracy_in_percent(
    figure: Figure, table: pd.DataFrame
) -> None:
    accuracy = sparsity_figure(table, "tiny", "rivers", "acc")
    assert {panel.get_yscale() for panel in figure.axes} == {"log"}
    assert {panel.get_yscale() for panel in accuracy.axes} == {"linear"}
    assert "acc on rivers (%)\n(higher is better)" in texts(accuracy)


def test_patterns_stand_apart_after_a_gap(figure: Figure) -> None:
    panel = figure.axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == [
        "50 %",
        "60 %",
        "70 %",
        "2:4",
    ]
    assert panel.get_xticks().tolist() == [0, 1, 2, 3.5]


def test_points_are_the_means_and_bars_the_standard_deviations(
    figure: Figure, table: pd.DataFrame
) -> None:
    levels = summarize(table)
    levels = levels[(levels["task"] == "heldout") & (levels["pruner"] == "wanda")]
    expected = levels[levels["source"] == "self-generated"].set_index("target")
    points = {round(x): y for x, y in bars(figure, 0)["self-generated"]}
    assert points[0] == pytest.approx(expected.loc["50 %", "mean"])
    assert points[1] == pytest.approx(expected.loc["60 %", "mean"])
    container = [each for each in figure.axes[0].containers if isinstance(each, ErrorbarContainer)]
    ends = container[2].lines[2][0].get_segments()
    lengths = sorted(segment[1][1] - segment[0][1] for segment in ends)
    assert lengths == pytest.approx(sorted(2 * expected["sd"]))


def test_sources_stand_side_by_side_at_a_target(figure: Figure) -> None:
    first = [min(x for x, _ in points) for points in bars(figure, 0).values()]
    gaps = [right - left for left, right in itertools.pairwise(first)]
    assert len(first) == 3
    assert min(gaps) > 0.1


def test_no_two_sources_of_up_to_seventy_look_the_same() -> None:
    styles = appearances(f"source {number}" for number in range(70))
    assert len(set(styles.values())) == 70


@pytest.mark.parametrize("task", ["heldout", "rivers"])
def test_nothing_overlaps(table: pd.DataFrame, task: str) -> None:
    metric = "perplexity" if task == "heldout" else "acc"
    assert overlapping(sparsity_figure(table, "tiny", task, metric)) == []


def test_long_names_and_four_pruners_do_not_overlap_either(table: pd.DataFrame) -> None:
    more = [table]
    for pruner in ("alpha", "beta"):
        copied = table[table["pruner"] == "wanda"].assign(pruner=pruner, method=pruner)
        more.append(copied.assign(cell=copied["cell"] + pruner))
    wide = pd.concat(more, ignore_index=True)
    wide["source"] = (
        wide["source"].astype(str).replace("mismatched", "a corpus in a language of its own kind")
    )
    assert overlapping(sparsity_figure(wide, "tiny", "heldout", "perplexity")) == []


def test_a_reference_far_beyond_is_written_at_the_edge(make_table: MakeTable) -> None:
    number = {"task": "heldout", "metric": "perplexity"}
    rows = [{"seed": seed, "value": 10.0 + seed, **number} for seed in (0, 1)]
    rows += [{**MAGNITUDE, "value": 5e6, **number}, {**DENSE, "value": 8.0, **number}]
    figure = sparsity_figure(make_table(rows), "tiny", "heldout", "perplexity")
    assert "↑ 5e6" in texts(figure)
    assert figure.axes[0].get_ylim()[1] < 100


def test_failed_cells_are_counted_and_not_drawn(make_table: MakeTable) -> None:
    failed = {"status": "failed", "task": None, "metric": None, "sparsity": 0.9}
    rows = [{"value": 10.0, "task": "heldout", "metric": "perplexity"}, failed]
    figure = sparsity_figure(make_table(rows), "tiny", "heldout", "perplexity")
    assert "Not shown: 1 of 2 cells, which failed." in " ".join(texts(figure))
    assert list(bars(figure, 0).values()) == [[(0.0, 10.0)]]


def test_what_was_not_measured_is_refused(table: pd.DataFrame) -> None:
    with pytest.raises(TableError, match="tiny has no acc of heldout"):
        sparsity_figure(table, "tiny", "heldout", "acc")


def test_equal_tables_give_equal_bytes(table: pd.DataFrame) -> None:
    one, other = (sparsity_figure(table, "tiny", "colours", "acc") for _ in range(2))
    assert svg_bytes(one) == svg_bytes(other)
    assert png_bytes(one) == png_bytes(other)
    assert b"<dc:date>" not in svg_bytes(one)


def boxed(left: float) -> Figure:
    """Return a figure whose lines are clipped to two boxes, the first at `left`."""
    figure = Figure()
    for place, width in ((left, 0.3), (0.6, 0.2)):
        axes = figure.add_axes((place, 0.2, width, 0.5))
        axes.plot([0, 1], [0, 1])
        axes.set_axis_off()
    return figure


def test_rounding_in_the_layout_changes_no_byte_and_figures_share_no_name() -> None:
    one, same, other = (svg_bytes(boxed(left)) for left in (0.1, 0.1 + 1e-13, 0.2))
    assert one == same
    names = [set(re.findall(rb'clipPath id="([^"]+)"', each)) for each in (one, other)]
    assert [len(each) for each in names] == [2, 2]
    assert not names[0] & names[1]
    assert all(one.count(b"url(#" + name + b")") > 0 for name in names[0])

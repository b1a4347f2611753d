"""The figure of the answer."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import svg_bytes
from analysis.overview import NO_DATA, overview_figure
from tests.analysis.conftest import MAGNITUDE, MakeTable
from tests.analysis.test_advice import rows


def shown(panel: Axes) -> dict[tuple[str, str], tuple[str, str]]:
    """Return the text and its weight by row and column."""
    across = [label.get_text() for label in panel.get_xticklabels()]
    down = [label.get_text() for label in panel.get_yticklabels()]
    return {
        (down[round(text.get_position()[1])], across[round(text.get_position()[0])]): (
            text.get_text(),
            str(text.get_fontweight()),
        )
        for text in panel.texts
    }


def drawn(make_table: MakeTable) -> Figure:
    made = rows({"prose-like": 1.25, "code-like": [1.3, 1.5]}, settings=2)
    magnitude = [
        {**MAGNITUDE, "task": text, "metric": "bits_per_byte", "value": 20.0}
        for text in ("prose", "code")
    ]
    figure = overview_figure(make_table([*made, *magnitude]).assign(note="A small model."), "tiny")
    assert figure is not None
    return figure


def test_every_number_is_the_mean_over_seeds_above_the_dense_model(make_table: MakeTable) -> None:
    (panel,) = drawn(make_table).axes
    numbers = shown(panel)
    assert numbers["prose-like", "prose"] == ("+0.250", "bold")
    assert numbers["code-like", "code"] == ("+0.400", "normal")
    assert numbers[NO_DATA, "prose"] == ("> 10", "normal")
    assert panel.get_title(loc="left") == "wanda 50 %"


def test_the_note_stands_below_and_equal_tables_give_equal_bytes(make_table: MakeTable) -> None:
    figure = drawn(make_table)
    assert any("A small model." in text.get_text() for text in figure.texts)
    assert svg_bytes(figure) == svg_bytes(drawn(make_table))


def test_nothing_is_drawn_without_a_calibrated_pruner(make_table: MakeTable) -> None:
    assert overview_figure(make_table(rows({})), "tiny") is None

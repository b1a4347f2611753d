import pytest

from pipeline.errors import InputError, cut


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("a", "x" * 200_000, "short"),
        ("a", {"b": ["y" * 10_000] * 10_000}, "short"),
        ("a", 1, "z" * 200_000 + ": do this"),
        ("a" * 5000, "x" * 5000, "line\n" * 5000 + ": do this"),
    ],
)
def test_any_message_is_one_line_below_300_characters(
    field: str, value: object, remedy: str
) -> None:
    message = str(InputError(field, value, remedy))
    assert len(f"error: {message}") < 300
    assert "\n" not in message
    assert message.endswith(remedy[-9:])


def test_a_short_message_is_whole() -> None:
    path = "/a/long/path/" + "b" * 100
    assert str(InputError("path", path, "remedy")) == f"path: '{path}': remedy"


@pytest.mark.parametrize("length", [1, 2, 3, 9, 10])
def test_a_cut_text_keeps_its_ends(length: int) -> None:
    text = "0123456789"
    short = cut(text, length)
    assert len(short) == length
    if length < len(text):
        before, after = short.split("…")
        assert text.startswith(before)
        assert text.endswith(after)

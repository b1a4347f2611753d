from docs.rooms import PICTURE, draw, floors, rooms


def test_the_picture_shows_the_rooms_as_they_are() -> None:
    assert PICTURE.read_text() == draw(), "draw it again: python docs/rooms.py"


def test_a_room_stands_above_all_that_it_imports_from() -> None:
    _, below = rooms()
    heights = floors(below)
    assert all(heights[room] > heights[other] for room in below for other in below[room])
    assert "pipeline.models" in below["pipeline.pruning"]

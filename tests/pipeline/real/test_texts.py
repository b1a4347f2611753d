import pytest

from pipeline.data.corpora import Document
from pipeline.real.texts import (
    LAST_SECTIONS,
    PASSAGE_CHARACTERS,
    SCENE,
    SECTION,
    passages,
    plain_text,
)

WIKITEXT = """{{Infobox|name=X}}'''Alkanes''' ({{lang|el|x}}, ) are
[[hydrocarbon|saturated]] ''chains''<ref>
book</ref>.
[[File:a.png|thumb|A [[picture]] of it]]
{| class="wikitable"
|-
| 1 || 2
|}
They burn .
[[Category:Alkanes]]"""


def test_mark_up_is_left_out_and_words_are_kept() -> None:
    assert plain_text(WIKITEXT) == "Alkanes are\nsaturated chains.\n\nThey burn."


def test_an_article_ends_where_its_lists_of_links_begin_and_is_cut_at_its_headings() -> None:
    article = "One.\n== Two ==\nText.\n=== Deeper ===\nMore.\n== See also ==\n* [[List]]\n"
    kept = LAST_SECTIONS.split(article)[0]
    assert SECTION.split(kept) == ["One.\n", "\nText.\n=== Deeper ===\nMore.\n"]


@pytest.mark.parametrize("heading", ["SCENE I. A hall.", "Scene 2", "  ACT I. SCENE II."])
def test_a_play_is_cut_before_its_scenes(heading: str) -> None:
    play = f"Persons.\n{heading}\nSpeech of a scene.\n"
    assert SCENE.split(play) == ["Persons.\n", f"{heading}\nSpeech of a scene.\n"]


def test_passages_are_whole_lines_of_one_document_in_order() -> None:
    text = "\n".join(f"line {number} " + 70 * "x" for number in range(40))
    found = list(passages(Document("work:0", text)))
    assert [passage.id for passage in found] == [f"work:0:{n}" for n in range(len(found))]
    assert all(len(passage.text) >= PASSAGE_CHARACTERS - 1 for passage in found)
    assert text.startswith("\n".join(passage.text for passage in found))

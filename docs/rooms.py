"""Draw the rooms of the project from its imports: `python docs/rooms.py` writes docs/rooms.svg.

A room is a folder of modules, or a module that stands by itself in pipeline/. It stands above all
rooms that it imports from; one that no other imports stands at the top. An arrow that follows from
others is left out.
"""

import ast
import sys
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "rooms.svg"
FOLDERS = ("analysis", "cluster", "jobs")
WIDTH, MARGIN, GAP, LINE, CHARACTER = 1120, 16, 46, 15, 6.7

STYLE = """
text { font: 11px ui-monospace, Menlo, Consolas, monospace; fill: #24292f; }
.name { font-weight: bold; font-size: 12px; }
.room { fill: #ffffff; stroke: #57606a; }
.pipeline { fill: #eef4fb; stroke: #3b6ea8; }
.arrow { stroke: #8c959f; stroke-width: 1.2; fill: none; marker-end: url(#head); }
.head { fill: #8c959f; }
.paper { fill: #fafbfc; }
"""


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for folder in ("pipeline", *FOLDERS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            if "notebooks" not in parts and name != "pipeline":
                found[name] = path
    return found


def room_of(module: str) -> str:
    """The room that a module belongs to."""
    parts = module.split(".")
    return parts[0] if parts[0] in FOLDERS else ".".join(parts[:2])


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The product's modules that a file imports when it runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & known.keys()


def rooms() -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """The modules of each room, and the rooms that each imports from."""
    known = modules()
    members: dict[str, list[str]] = {}
    below: dict[str, set[str]] = {}
    for module, path in known.items():
        room = room_of(module)
        members.setdefault(room, []).append(
            module.removeprefix(f"{room}.") if module != room else ""
        )
        below.setdefault(room, set())
        below[room] |= {room_of(name) for name in imported(path, known)} - {room}
    return members, below


def floors(below: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room, 0 at the bottom: one above the highest that it imports from.

    Raises:
        RecursionError: if rooms import from each other in a circle.
    """
    heights: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in heights:
            heights[room] = 1 + max(map(height, below[room]), default=-1)
        return heights[room]

    for room in below:
        height(room)
    highest = max(heights.values())
    return {
        room: found if any(room in others for others in below.values()) else highest
        for room, found in heights.items()
    }


def without_shortcuts(below: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows between rooms that do not follow from two or more others."""

    def reach(room: str) -> set[str]:
        return below[room].union(*(reach(other) for other in below[room]))

    return [
        (room, other)
        for room in sorted(below)
        for other in sorted(below[room])
        if not any(other in reach(between) for between in below[room] - {other})
    ]


def contents(members: list[str]) -> list[str]:
    """The modules and folders in a room."""
    shown = {f"{name.partition('.')[0]}/" if "." in name else name for name in members if name}
    return sorted(name for name in shown if not name.startswith("_") and f"{name}/" not in shown)


def draw() -> str:
    """The picture as SVG."""
    members, below = rooms()
    heights = floors(below)
    boxes: dict[str, tuple[float, float, float, float]] = {}
    texts: dict[str, list[str]] = {}
    top = float(MARGIN)
    for floor in range(max(heights.values()), -1, -1):
        row = sorted(room for room, height in heights.items() if height == floor)
        listed = {room: ", ".join(contents(members[room])) for room in row}
        weights = {room: max(1.4, 1 + min(len(listed[room]), 240) / 80) for room in row}
        share = (WIDTH - MARGIN * (len(row) + 1)) / sum(weights.values())
        left = tallest = float(MARGIN)
        for room in row:
            width = share * weights[room]
            texts[room] = textwrap.wrap(listed[room], int((width - 20) / CHARACTER))
            boxes[room] = (left, top, width, 24 + LINE * len(texts[room]))
            left += width + MARGIN
            tallest = max(tallest, boxes[room][3])
        top += tallest + GAP
    height = top - GAP + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" role="img" aria-label="The rooms of calprune and their imports">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path class="head" d="M0 0L8 4L0 8z"/></marker></defs>',
        f'<rect class="paper" width="{WIDTH}" height="{height:g}"/>',
    ]
    arrows = without_shortcuts(below)
    for upper, lower in arrows:
        x, y, width, tall = boxes[upper]
        targets = sorted(boxes[other][0] for above, other in arrows if above == upper)
        place = (targets.index(boxes[lower][0]) + 1) / (len(targets) + 1)
        left, end, span, _ = boxes[lower]
        sources = sorted((boxes[above][0], above) for above, other in arrows if other == lower)
        landing = ([above for _, above in sources].index(upper) + 1) / (len(sources) + 1)
        start_x, start_y, end_x = x + width * place, y + tall, left + span * landing
        parts.append(
            f'<path class="arrow" d="M{start_x:.1f} {start_y:.1f}C{start_x:.1f} '
            f'{start_y + 30:.1f} {end_x:.1f} {end - 30:.1f} {end_x:.1f} {end:.1f}"/>'
        )
    for room, (x, y, width, tall) in boxes.items():
        kind = "pipeline" if room.startswith("pipeline") else "room"
        suffix = "/" if any(members[room]) else ".py"
        parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{tall:.1f}" rx="6"/>'
            f'<text class="name" x="{x + 10:.1f}" y="{y + 17:.1f}">'
            f"{escape(room.replace('.', '/') + suffix)}</text>"
        )
        for number, line in enumerate(texts[room]):
            parts.append(
                f'<text x="{x + 10:.1f}" y="{y + 17 + LINE * (number + 1):.1f}">'
                f"{escape(line)}</text>"
            )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    sys.stdout.write(f"{PICTURE}\n")
    PICTURE.write_text(draw(), encoding="utf-8")

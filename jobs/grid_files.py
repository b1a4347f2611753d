"""Grid files, and the grids that calprune brings, which a command takes by their names."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import InputError

GRIDS = Path(__file__).parent / "grids"


def grid_file(named: str) -> Path:
    """Return the file of a grid: that of this path, else the one that calprune brings.

    Raises:
        InputError: if it is a name, and neither has it.
    """
    path = Path(named)
    if path.suffix or path.is_file():
        return path
    brought = {each.stem: each for each in sorted(GRIDS.glob("*.yaml"))}
    if named not in brought:
        remedy = f"there is no such file, and calprune brings {', '.join(brought)}"
        raise InputError("grid", named, remedy)
    return brought[named]


GridFile = Annotated[
    Path,
    typer.Argument(
        parser=grid_file,
        help="Grid file in YAML, or the name of a grid that calprune brings, such as demo.",
        show_default=False,
    ),
]

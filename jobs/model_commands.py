"""`calprune prune|calibrate|best|init`: from a model to its pruned checkpoint."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from jobs import library
from jobs.before_after import as_table, losses
from jobs.cells import Cell
from jobs.console import AsJson, console, print_json
from jobs.grid import load_grid
from jobs.grid_files import GridFile
from jobs.new_grid import write_grid
from jobs.one_model import OneModel
from jobs.stores import StoreUrl

logger = logging.getLogger("jobs")

ModelName = Annotated[
    str, typer.Argument(help="A folder, or NAME[@REVISION] on the hub.", show_default=False)
]
Folder = Annotated[Path, typer.Option("--out", help="A new folder.", show_default=False)]
Prefixes = Annotated[
    list[str] | None,
    typer.Option(
        help="File or preset whose first tokens the model continues; several are mixed. Default: "
        "Wikipedia on the hub."
    ),
]
Windows = Annotated[int, typer.Option(min=1, help="Windows of calibration text.")]
Tokens = Annotated[
    int | None,
    typer.Option(min=8, help="Tokens of a window. Default: 2048, or what the model takes."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the draw of texts.")]
Cpus = Annotated[
    int | None,
    typer.Option(min=1, help="Of a stage. Default: all here; 1 with a GPU or --address."),
]
Gpus = Annotated[
    float | None,
    typer.Option(min=0, help="Of a stage. Default: 1 if there is one here, or with --address."),
]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster. Default: a local one.")]


def prune(
    model: ModelName,
    sparsity: Annotated[
        str, typer.Option(help="Share of weights, such as 0.5, or N:M.", show_default=False)
    ],
    folder: Folder,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="`self`, which the model writes; or a file or preset such as c4. Several files "
            "are mixed."
        ),
    ] = None,
    prefixes: Prefixes = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out file or preset to compare with the dense model on. Default: WikiText-2."
        ),
    ] = None,
    pruner: Annotated[str, typer.Option(help="wanda, sparsegpt, alps, ria, ...")] = "wanda",
    allocation: Annotated[str, typer.Option(help="uniform or owl.")] = "uniform",
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Fit the kept weights afterwards.")
    ] = False,
    nsamples: Windows = 128,
    seqlen: Tokens = None,
    seed: Seed = 0,
    cpus: Cpus = None,
    gpus: Gpus = None,
    store: StoreUrl = ".calprune",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Prune a model, compare it with the dense one and write an ordinary checkpoint with a card.

    Run the same command again to continue it. Exits with 1 if a stage failed.
    """
    asked = OneModel(
        model=model,
        calibration=tuple(calibration or ("self",)),
        prefixes=tuple(prefixes or ()),
        probe=tuple(probe or ()),
        sparsity=sparsity,
        pruner=pruner,
        allocation=allocation,
        reconstruct=reconstruct,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        cpus=cpus,
        gpus=gpus,
    )
    key, measured = library.prune(asked, folder, store, address=address)
    if as_json:
        numbers = [each._asdict() for each in measured]
        print_json({"folder": str(folder), "prune_key": key, "measured": numbers}, console)
        return
    target = Cell(model=model, pruner=pruner, sparsity=sparsity).target_name
    method = f"{pruner}, reconstructed" if reconstruct else pruner
    console.print(as_table(measured, f"{model}, {target} by {method}"))
    for sentence in losses(measured):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"checkpoint: {folder}", soft_wrap=True)


def calibrate(
    model: ModelName,
    folder: Folder,
    prefixes: Prefixes = None,
    nsamples: Windows = 128,
    seqlen: Tokens = None,
    seed: Seed = 0,
    cpus: Cpus = None,
    gpus: Gpus = None,
    store: StoreUrl = ".calprune",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Let a model write its calibration set, for quantizers and others, as a data set with a card.

    Run the same command again to continue it.
    """
    asked = OneModel(
        model,
        prefixes=tuple(prefixes or ()),
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        cpus=cpus,
        gpus=gpus,
    )
    key, samples = library.calibrate(asked, folder, store, address=address)
    if as_json:
        print_json({"folder": str(folder), "key": key, "samples": samples}, console)
    else:
        console.print(f"{samples} samples: {folder}", soft_wrap=True)


def best(
    grid: GridFile,
    store: StoreUrl = ".calprune",
    model: Annotated[
        str | None, typer.Option(help="One of the grid's models, if it has several.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="One of its targets, as 0.5, 2:4 or '4 bit', if it has several."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--export", help="Write the model to this new folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose the best pruned model of a finished grid, say why, and export it."""
    from jobs.best import print_best  # imported late, as it brings scipy

    found = library.best(load_grid(grid), store, model=model, sparsity=sparsity, folder=folder)
    if not as_json:
        print_best(found, console)
    if as_json:
        candidates = [each._asdict() for each in found.standings]
        answer = {
            "prune_key": found.prune_key,
            "reason": found.reason,
            "metric": found.metric,
            "candidates": candidates,
            "failed": found.failed,
            "folder": None if folder is None else str(folder),
        }
        print_json(answer, console)
    elif folder is not None:
        console.print(f"checkpoint: {folder}", soft_wrap=True)


def init(
    models: Annotated[
        list[str],
        typer.Argument(help="Folders, or NAME[@REVISION] on the hub.", show_default=False),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(help="File or preset to calibrate with; give it for each text."),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(help="Held-out file or preset to measure on; give it for each text."),
    ] = None,
    file: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("grid.yaml"),
) -> None:
    """Write a commented grid file for some models and texts."""
    write_grid(file, models, tuple(text or ()), tuple(probe or ()))
    console.print(f"grid: {file}", soft_wrap=True)

"""`calprune prune|calibrate|best|init`: from a model to its pruned checkpoint."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from cluster.store import Store
from jobs.before_after import as_table, before_after, losses
from jobs.check import check_plan
from jobs.console import AsJson, console, print_json
from jobs.export import check_unused, export
from jobs.export_calibration import export_calibration
from jobs.fetch import copies
from jobs.gather import gather, write_table
from jobs.grid import load_grid
from jobs.new_grid import write_grid
from jobs.one_model import OneModel, calibration_plan, pruning_plan, this_machine
from jobs.plan import Plan, make_plan
from jobs.run import run_grid
from jobs.stores import StoreUrl, open_store, writable_store
from pipeline.hub import used

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
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
    )
    check_unused(folder)
    plan, key = pruning_plan(_with_devices(asked, cpus, gpus, address))
    kept = writable_store(store)
    _run(plan, kept, address)
    results = gather(plan, kept)
    write_table(results, plan.grid.name, kept)
    export(kept, key, folder)
    measured = before_after(results, key)
    if as_json:
        numbers = [each._asdict() for each in measured]
        print_json({"folder": str(folder), "prune_key": key, "measured": numbers}, console)
        return
    console.print(as_table(measured, f"{model}, pruned to {sparsity} by {pruner}"))
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
    asked = OneModel(model, ("self",), tuple(prefixes or ()), nsamples=nsamples, seqlen=seqlen)
    asked = _with_devices(asked._replace(seed=seed), cpus, gpus, address)
    check_unused(folder)
    plan, key = calibration_plan(asked)
    kept = writable_store(store)
    _run(plan, kept, address)
    samples = export_calibration(kept, key, folder)
    if as_json:
        print_json({"folder": str(folder), "key": key, "samples": samples}, console)
    else:
        console.print(f"{samples} samples: {folder}", soft_wrap=True)


def best(
    grid: Annotated[Path, typer.Argument(help="Grid file in YAML.", show_default=False)],
    store: StoreUrl = ".calprune",
    model: Annotated[
        str | None, typer.Option(help="One of the grid's models, if it has several.")
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="One of its sparsities, if it has several.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--export", help="Write the model to this new folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose the best pruned model of a finished grid, say why, and export it."""
    from jobs.best import best_cell, print_best  # imported late, as it brings scipy

    kept = open_store(store)
    if folder is not None:
        check_unused(folder)
    found = best_cell(make_plan(load_grid(grid)), kept, model, sparsity)
    if not as_json:
        print_best(found, console)
    if folder is not None:
        export(kept, found.prune_key, folder)
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


def _with_devices(
    asked: OneModel, cpus: int | None, gpus: float | None, address: str | None
) -> OneModel:
    of_stage = this_machine() if address is None else (1, 1.0)
    default = 1 if gpus else of_stage[0]
    return asked._replace(
        cpus=default if cpus is None else cpus, gpus=of_stage[1] if gpus is None else gpus
    )


def _run(plan: Plan, store: Store, address: str | None) -> None:
    """Check a plan and run it; exit with 1 if a stage failed."""
    with used(copies(plan, store) if store.local else {}):
        for note in check_plan(plan):
            logger.warning("%s", note)
    outcome = run_grid(plan, store, address, None)
    if outcome.failed:
        for failure in outcome.failed.values():
            logger.error("%s: %s", failure.kind, failure.error)
        logger.error("%d stages failed; run the same command to retry them", len(outcome.failed))
        raise typer.Exit(1)

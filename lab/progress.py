"""What a person sees while a study runs, and the tables at its end."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lab.records import Record
from lab.trials import Progress

if TYPE_CHECKING:
    from lab.claims import Verdict
    from lab.replication import Pair
    from lab.study import Study
    from lab.tracking import Tracker

COLOURS = {"supported": "green", "refuted": "red", "conditional": "yellow", "inconclusive": "magenta", "not run": "dim"}


class Reporter:
    """Prints a line for each trial, with the time left, and hands its record to MLflow."""

    def __init__(self, experiment: str, study: Study):
        self.experiment = study.registry.experiment(experiment)
        self.study = study
        self.console = Console(stderr=False, highlight=False, soft_wrap=True)
        self.reused = 0
        self.tracker: Tracker | None = None

    def __enter__(self) -> Reporter:
        from lab.tracking import Tracker

        names = list(self.study.registry.experiments)
        place = f"experiment {names.index(self.experiment.name) + 1} of {len(names)}"
        self.console.print(f"[bold]{self.experiment.title}[/bold] ({place}, profile {self.study.workspace.profile})")
        self.tracker = Tracker.open(self.study.workspace, warn)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.reused:
            self.console.print(f"  {self.reused} trials were measured before and still hold")
        if self.tracker:
            self.tracker.close()

    def __call__(self, record: Record, progress: Progress, was_there: bool) -> None:
        """One record more."""
        if self.tracker:
            self.tracker.log(record, [claim.id for claim in self.experiment.claims])
        if was_there:
            self.reused += 1
            return
        bar = _bar(progress.done / progress.total)
        left = "" if progress.seconds_left is None else f", about {_duration(progress.seconds_left)} to go"
        outcome = "" if record.status == "ok" else f" [red]{record.status}[/red]: {record.message}"
        self.console.print(
            f"  {bar} {progress.done}/{progress.total}{left}  {record.spec.name}{outcome} ({record.provenance.seconds:.1f} s)"
        )


def warn(text: str) -> None:
    """One line on standard error; the study goes on."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _bar(share: float, width: int = 20) -> str:
    filled = round(share * width)
    return "━" * filled + "╌" * (width - filled)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def number(value: float | None) -> str:
    """A figure for a table: four significant digits, a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def verdict_table(found: Sequence[Verdict], console: Console | None = None) -> None:
    """Claim, tier, verdict, effect with interval, n, one line of advice; a table for each profile."""
    console = console or _console()
    for profile in dict.fromkeys(verdict.profile for verdict in found):
        table = Table(title=f"Verdicts, profile {profile}", title_justify="left", show_lines=True)
        for column in ("claim", "tier", "verdict", "effect [interval]", "n", "advice"):
            table.add_column(column, overflow="fold")
        for verdict in (v for v in found if v.profile == profile):
            colour = COLOURS[verdict.verdict]
            table.add_row(
                verdict.claim,
                verdict.tier,
                f"[{colour}]{verdict.verdict}[/{colour}]",
                effect(verdict),
                str(verdict.n),
                verdict.advice,
            )
        console.print(table)


def pair_table(found: Sequence[Pair], other: str) -> None:
    """Claim and tier, with verdict and effect as they were found there and as they are here."""
    table = Table(title=f"Other than in {other}", title_justify="left", show_lines=True)
    for column in ("claim", "tier", f"in {other}", "here"):
        table.add_column(column, overflow="fold")
    for pair in found:
        sides = [f"[{COLOURS[v.verdict]}]{v.verdict}[/]\n{effect(v)}" for v in (pair.there, pair.here)]
        table.add_row(pair.here.claim, pair.here.tier, *sides)
    _console().print(table)


def markdown_row(verdict: Verdict) -> str:
    """A verdict as a row of the table in README.md."""
    size = "-" if verdict.effect is None else effect(verdict)
    return f"| `{verdict.claim}` | {verdict.tier} | {verdict.verdict} | {size} | {verdict.n} | {verdict.advice} |"


def _console() -> Console:
    """The terminal, or, where the output goes to a file, a page wide enough for the table."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def effect(verdict: Verdict) -> str:
    """The effect with its interval and unit, as text."""
    if verdict.effect is None:
        return verdict.because
    return f"{number(verdict.effect)} [{number(verdict.low)}, {number(verdict.high)}] {verdict.unit}"


def claims_table(rows: Sequence[dict[str, Any]]) -> None:
    """The claims with their thresholds."""
    table = Table(show_lines=True)
    for column in ("claim", "statement", "tiers", "threshold"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row["claim"], row["statement"], ", ".join(row["tiers"]), row["threshold"])
    Console().print(table)

"""What does `paged_adamw_8bit` page: parameters or optimizer state, to a disk or to host memory, and when?

Claim     paged-adamw-pages (lecture 4)
Refuted   if on a filled card no parameter leaves it, or less than DISK_SHARE of what leaves it is written to a disk or swap
Control   a run that does keep half of its parameters in files; the paged bytes counted in host memory alone
Run       lab run paged_optimizer --profile gpu

Managed memory is a card's: without one nothing is measured, and the verdict is `not run`. On a processor the optimizer
falls back to an unpaged one, which is no evidence.

A card is filled until only a part of the optimizer's state has room, and what the driver, the kernel and torch count is
compared: with the same run on a card that is not filled (when does it page?), and with the unpaged 8-bit optimizer on the
filled one (does paging save the run?). What bitsandbytes' source leads one to expect stands in lab/paging.py.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lab.claims import Claim, Control, Evidence, Experiment, Finding, over_answers
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Paging, Precision, TrialSpec
from lab.statistics import Answer, Interval, lies_above, mean_interval

NAME = "paged_optimizer"
PAGED, UNPAGED = "paged_adamw_8bit", "adamw_bnb_8bit"
GIB = 2**30

# Half: what leaves the card goes either to a disk or to host memory, and more than half has gone where most of it is.
DISK_SHARE = 0.5

# What has to leave a filled card before a run says anything about where it goes: a tenth of the state is tens of MiB of
# the smallest model that is asked for, far above what the driver allocates by itself.
LEAST_AWAY = 0.1


class Params(Section):
    """`rooms` are the shares of the optimizer's state for which a filled card has room."""

    model: str
    precision: Precision
    batch: Count
    length: Count
    updates: Count
    repeats: Count
    rooms: tuple[float, ...] = Field(min_length=1)


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Paged on a free card and on filled ones; unpaged on the fullest; and one that keeps parameters on the disk."""
    arms: list[tuple[str, dict[str, Any]]] = [("free", {"optimizer": PAGED})]
    arms += [("paged", {"optimizer": PAGED, "room": room}) for room in params.rooms]
    arms += [("unpaged", {"optimizer": UNPAGED, "room": min(params.rooms)})]
    arms += [("control-disk", {"optimizer": UNPAGED, "fault": "disk"})]
    shared = params.model_dump(exclude={"repeats", "rooms"}) | {"device": profile.device}
    specs = []
    for repeat in range(params.repeats):
        for arm, changes in arms:
            settings = Paging.model_validate({**shared, **changes, "seed": repeat})
            room = f"-room{settings.room:g}" if settings.room is not None else ""
            specs.append(TrialSpec(experiment=NAME, name=f"{arm}{room}-{repeat}", arm=arm, settings=settings))
    return specs


# paged-adamw-pages ----------------------------------------------------------------------------------------------


def _away(record: Record) -> float:
    """Bytes of parameters and of paged state that do not lie on the card."""
    return record.figure("parameters_away_bytes") + record.figure("displaced_bytes")


def _disk_share(record: Record) -> float:
    """The bytes that went to a disk, as a share of those that are away. A file that is written again counts again."""
    return (record.figure("written_bytes") + record.figure("swapped_bytes")) / _away(record)


def _both(first: Answer, second: Answer) -> Answer:
    if "no" in (first, second):
        return "no"
    return "yes" if first == second == "yes" else "undecided"


def _moved(record: Record) -> bool:
    """Whether enough left the card to say where it went."""
    return _away(record) >= LEAST_AWAY * record.figure("expected_state_bytes")


def _answers(records: list[Record], share: Interval) -> tuple[Answer, Answer]:
    """Of the repeats under one pressure: are parameters paged, and does what leaves go to a disk."""
    if len(records) < 2 or not all(map(_moved, records)):
        return "undecided", "undecided"
    paged = {r.figure("parameters_away_bytes") > 0 for r in records}
    return "undecided" if len(paged) > 1 else "yes" if paged == {True} else "no", lies_above(share, DISK_SHARE)


def judge_paging(evidence: Evidence) -> Finding:
    """Under each pressure: whether parameters leave the card, and whether what leaves goes to a disk."""
    found = evidence.select("paged")
    answers: list[Answer] = []
    shares: list[Interval] = []
    notes: list[str] = []
    for room in sorted({r.setting("room") for r in found}, key=lambda room: -1 if room is None else room):
        under = [r for r in found if r.setting("room") == room]
        name = "on a card that is not filled" if room is None else f"with room for {room:.0%} of the state"
        if not any(map(_moved, under)):
            notes.append(f"{name} too little left the card to say where it goes")
            continue
        share = mean_interval([_disk_share(r) for r in under])
        answers.append(_both(*_answers(under, share)))
        shares.append(share)
        notes.append(
            f"{name} {_mean(under, 'parameters_away_bytes')} of parameters and {_mean(under, 'displaced_bytes')} of state lie "
            f"elsewhere, {_mean(under, 'written_bytes')} were written, {_mean(under, 'swapped_bytes')} swapped, and host memory "
            f"fell by {_mean(under, 'host_bytes')}"
        )
    notes += _beside(evidence, found)
    if not shares:
        return Finding("inconclusive", None, None, None, "", len(found), "; ".join(notes))
    least = min(shares, key=lambda share: share.low)
    unit = "of the bytes that leave the card go to a disk, under the pressure with least"
    return Finding.of(over_answers(answers), least, unit, "; ".join(notes))


def _beside(evidence: Evidence, found: list[Record]) -> list[str]:
    """When it pages, what torch's own counters see, and whether it saves the run: told, not judged."""
    notes = []
    if evidence.has("free"):
        free = evidence.select("free")
        notes.append(
            f"on a card that is not filled {_mean(free, 'displaced_bytes')} of {_mean(free, 'state_paged_bytes')} are away, torch "
            f"counts {_mean(free, 'allocated_bytes')} and the driver {_mean(free, 'driver_bytes')}"
        )
        timed = [r for r in found if r.figures.get("seconds_per_update") is not None]
        if timed:
            slower = _fmean(timed, "seconds_per_update") / _fmean(free, "seconds_per_update")
            notes.append(f"an update takes {slower:.1f} times as long on the filled one")
    notes.append(f"{_survived(found)} paged runs end")
    if evidence.has("unpaged"):
        notes.append(f"{_survived(evidence.select('unpaged'))} unpaged ones")
    return notes


def _fmean(records: list[Record], name: str) -> float:
    return sum(r.figure(name) for r in records) / len(records)


def _mean(records: list[Record], name: str) -> str:
    return f"{_fmean(records, name) / GIB:.2f} GiB"


def _survived(records: list[Record]) -> str:
    return f"{sum(r.figure('survived') > 0 for r in records)} of {len(records)}"


def on_disk(evidence: Evidence) -> Evidence:
    """Runs that do keep half of their parameters in files, in the place of the paged ones."""
    return evidence.replace("paged", by="control-disk")


def in_host_memory(evidence: Evidence) -> Evidence:
    """The paged runs as if all of their state had left the card, no parameter had, and no disk had been written."""
    nothing = {"parameters_away_bytes": 0.0, "written_bytes": 0.0, "swapped_bytes": 0.0}

    def change(record: Record) -> dict[str, float]:
        if record.spec.arm != "paged":
            return {}
        return {"displaced_bytes": record.figure("expected_state_bytes"), **nothing}

    return evidence.with_figures(change)


# Plot -----------------------------------------------------------------------------------------------------------


def place_lines(evidence: Evidence) -> dict[str, Line]:
    """Where the bytes of the paged state lie, over the room that the card has for it; a card that is not filled has all."""
    runs = [(1.0, evidence.select("free"))]
    found = evidence.select("paged")
    runs += [(room, [r for r in found if r.setting("room") == room]) for room in {r.setting("room") for r in found}]
    runs.sort(key=lambda run: run[0])
    x = [100 * room for room, _ in runs]
    figures = {
        "state on the card": "unseen_bytes",
        "state elsewhere": "displaced_bytes",
        "parameters elsewhere": "parameters_away_bytes",
        "written to a disk": "written_bytes",
        "host memory taken": "host_bytes",
    }
    return {label: Line(x, [_fmean(under, name) / GIB for _, under in runs]) for label, name in figures.items()}


EXPERIMENT = Experiment(
    name=NAME,
    title="The paged optimizer",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="paged-adamw-pages",
            statement="paged_adamw_8bit keeps part of the model parameters in memory and the rest on disk",
            lecture="4",
            tiers=("gpu",),
            threshold=(
                f"under every pressure parameters leave the card, and the 95 % interval of the share of what leaves it that is "
                f"written to a disk or swap lies above {DISK_SHARE:.0%}"
            ),
            scope=(
                "bitsandbytes through the Trainer's optimizer, full fine-tuning of a bundled shape on a card filled by a dummy "
                "allocation; host memory is the machine's, so what else it does shows in it"
            ),
            judge=judge_paging,
            controls={
                "half of the parameters in files": Control(on_disk, "supported"),
                "all of the state in host memory": Control(in_host_memory, "refuted"),
            },
            advice={
                "supported": "Give it a fast disk with room for the model, and expect updates to wait for it.",
                "conditional": "Look at the disk and at host memory at your own pressure: where it pages to depends on it.",
                "refuted": "Plan the card for the weights and host memory for optimizer state: no disk holds the rest.",
                "inconclusive": "Plan as if nothing were paged: choose what fits the card; keep host memory free for the state.",
            },
        ),
    ),
    plots=(
        Plot(
            "paged-state",
            "Where the paged optimizer's bytes lie",
            "% of the state for which the card has room",
            "GiB",
            place_lines,
        ),
    ),
)

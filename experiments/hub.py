"""A revision that is pinned on the hub: are its bytes the same again, after `main` has moved and after a fault on the way?

Claim     hub-pinned-revision (lecture 1)
Refuted   if two loads of one pin from empty caches differ, or differ from what was committed, or a load of the pin changes
          when `main` moves; conditional if a fault on the way or in the cache passes unnoticed, or an interrupted download
          begins again from nothing
Control   a hub that serves `main` whatever is asked for; one whose `main` stays, which shows nothing
Run       lab run hub --profile cpu
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from pydantic import Field

from lab.claims import Claim, Control, Evidence, Experiment, Finding, VerdictName
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import HubDownloads, TrialSpec
from lab.statistics import span

NAME = "hub"

# Equal means equal: hashes of files, weights and rows are compared, and nothing is rounded. One load that differs is a
# counterexample, so no share of them is allowed.
ALWAYS = 1

CORE: dict[str, tuple[str, ...]] = {
    "two empty caches": (
        "cold_bytes_equal",
        "cold_bytes_committed",
        "cold_commit_equal",
        "cold_weights_equal",
        "cold_fingerprint_equal",
    ),
    "main has moved": ("pinned_cold_equal", "pinned_warm_equal"),
}
"""What reproducible means, and the figures that say so. Without these the claim is false."""

MOVED = ("unpinned_cold_changed", "unpinned_warm_changed")
"""Without these nothing has been tried: a pin matters where `main` moves."""

FAULTS: dict[str, tuple[str, ...]] = {
    "a connection breaks": ("broken_right",),
    "the download is killed": ("killed_right",),
    "half a file arrives": ("short_noticed",),
    "a bit is turned over on the way": ("wire_noticed",),
    "a bit is turned over in the cache": ("cache_noticed",),
}
"""Where a load of the pin must give the committed bytes or an error. Clients that trust lengths alone fail the last two."""

MIB = 2**20

# lab/hub.py downloads a file of 24 MiB whose connection breaks in the middle, and kills the client there.
KILLED_AT = 12 * MIB

RESUMED: dict[str, Callable[[Record], bool]] = {
    "a broken connection is gone on with": lambda r: max(_places(r)[1]) > 0,
    "a killed download is gone on with": lambda r: r.figure("killed_bytes_again") < KILLED_AT,
}
"""Where what had arrived of an interrupted download is kept, in part at least. A client that starts from 0 fails both."""


class Public(Section):
    """Repositories on the public hub that are small and have an older commit with the same files."""

    model: str
    data_set: str


class Params(Section):
    """How often, and whether the public hub is asked too."""

    seeds: Count
    large_mib: tuple[Count, ...] = Field(min_length=1)
    """The lengths of files whose connection breaks in the middle."""
    public: Public | None = None
    """Where the public hub can be reached."""


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """The loopback hub for each seed, and two with a fault planted; last the public one, where it is named."""
    specs = [
        _spec("loopback", f"loopback-seed{seed}", HubDownloads(large_mib=params.large_mib, seed=seed))
        for seed in range(params.seeds)
    ]
    specs += [
        _spec("ignores-revisions", "ignores-revisions", HubDownloads(fault="ignores-revisions")),
        _spec("never-moves", "never-moves", HubDownloads(fault="never-moves")),
    ]
    if params.public:
        named = HubDownloads(endpoint="public", model=params.public.model, data_set=params.public.data_set)
        specs.append(_spec("public", "public", named))
    return specs


def _spec(arm: str, name: str, settings: HubDownloads) -> TrialSpec:
    return TrialSpec(experiment=NAME, name=name, arm=arm, settings=settings)


# Judge ----------------------------------------------------------------------------------------------------------


def judge(evidence: Evidence) -> Finding:
    """What holds in every trial: refuted without the core, conditional where a fault passes unnoticed or nothing is kept."""
    loopback = evidence.select("loopback")
    asked = [*loopback, *(evidence.select("public") if evidence.has("public") else [])]
    shares = span([_share(record, CORE) for record in asked])
    unit = "of the facts about a pin hold"
    broken = [regime for regime, figures in CORE.items() if not all(_holds(r, figures) for r in asked)]
    if broken:
        said = "; ".join(f"a pin does not give the same when {regime}" for regime in broken)
        return Finding.of("refuted", shares, unit, said)
    if not all(_holds(record, MOVED) for record in asked):
        return Finding.of("inconclusive", shares, unit, "main did not move, so nothing shows what a pin is good for")
    unnoticed = [regime for regime, figures in FAULTS.items() if not all(_holds(r, figures) for r in loopback)]
    lost = [fact for fact, holds in RESUMED.items() if not all(map(holds, loopback))]
    verdict: VerdictName = "conditional" if unnoticed or lost else "supported"
    shares = span([_share(r, {**CORE, **FAULTS}, RESUMED.values()) for r in loopback])
    again = max(r.figure("killed_bytes_again") for r in loopback)
    reasons = [
        f"in {len(asked)} trials the pin gave the same, cold and warm, before and after main moved",
        f"no error and other bytes when {' or '.join(unnoticed)}" if unnoticed else "no fault passed unnoticed",
        _verified(loopback),
        f"of a broken file up to {max(map(_lost, loopback)) / MIB:.0f} MiB are sent again, and "
        f"{again / MIB:.0f} MiB ({'all' if again >= KILLED_AT else f'{again / KILLED_AT:.0%}'} that had arrived) after the "
        "download was killed",
        *(f"not so that {fact}" for fact in lost),
    ]
    return Finding.of(verdict, shares, unit, "; ".join(reasons))


def _holds(record: Record, figures: tuple[str, ...]) -> bool:
    return all(record.figure(name) == ALWAYS for name in figures)


def _share(
    record: Record,
    regimes: Mapping[str, tuple[str, ...]],
    further: Iterable[Callable[[Record], bool]] = (),
) -> float:
    """Of the facts, which hold."""
    facts = [record.figure(name) == ALWAYS for figures in regimes.values() for name in figures]
    facts += [holds(record) for holds in further]
    return sum(facts) / len(facts)


def _verified(records: list[Record]) -> str:
    found = all(_holds(r, ("wire_verified", "cache_verified", "sound_verified")) for r in records)
    return f"comparing with the hub's hashes {'finds' if found else 'does not find'} every bit turned over"


def _lost(record: Record) -> float:
    """The most bytes that had arrived when a connection broke and were sent again."""
    return max(at - resumed for at, resumed in zip(*_places(record), strict=True))


def _places(record: Record) -> tuple[list[float], list[float]]:
    at, resumed = (
        [value for value in record.series[name] if value is not None]
        for name in ("broken_at_bytes", "resumed_at_bytes")
    )
    return at, resumed


# Controls -------------------------------------------------------------------------------------------------------


def _by(arm: str) -> Callable[[Evidence], Evidence]:
    """The trials of a faulty loopback hub as the only ones: what the public hub gave is no fault planted here."""
    return lambda evidence: Evidence(evidence.replace("loopback", by=arm).select("loopback"))


def flawless(evidence: Evidence) -> Evidence:
    """Every fact holds in every trial, and what had arrived is kept."""
    facts = [name for figures in [*CORE.values(), MOVED, *FAULTS.values()] for name in figures]
    facts += ["wire_verified", "cache_verified", "sound_verified"]
    kept = [
        r.model_copy(update={"series": {**r.series, "resumed_at_bytes": r.series["broken_at_bytes"]}})
        for r in evidence.select("loopback")
    ]
    return Evidence(kept).with_figures(lambda _: {**dict.fromkeys(facts, 1.0), "killed_bytes_again": 0.0})


# Plot -----------------------------------------------------------------------------------------------------------


def resumed_lines(evidence: Evidence) -> dict[str, Line]:
    """MiB of a file that are kept over MiB that had arrived when the connection broke."""
    at, resumed = _places(evidence.select("loopback")[0])
    arrived = [value / MIB for value in at]
    return {"arrived": Line(arrived, arrived), "kept": Line(arrived, [value / MIB for value in resumed])}


EXPERIMENT = Experiment(
    name=NAME,
    title="A pinned revision",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="hub-pinned-revision",
            statement="the hub is git-based, so a pinned revision is a reproducible artifact",
            lecture="1",
            tiers=("cpu",),
            threshold="the same hashes of files, weights and rows, the same commit and data set fingerprint, in every load of "
            "a pin; under a fault the committed bytes or an error; of an interrupted download some bytes are kept",
            scope="huggingface_hub, transformers and datasets as installed, against a hub on the loopback (no xet) with a small "
            "Llama and two data sets; a full commit hash; the public hub where the profile names it; repeats draw other bytes and "
            "nothing else, so that their interval is a span",
            judge=judge,
            controls={
                "a hub that ignores revisions": Control(_by("ignores-revisions"), "refuted"),
                "a main that never moves": Control(_by("never-moves"), "inconclusive"),
                "nothing to find fault with": Control(flawless, "supported"),
            },
            advice={
                "supported": "Pin models and data by the full commit hash and record it; main can move between two runs.",
                "conditional": "Pin the full commit hash, and run `hf cache verify` on what must be exact: a client may check "
                "lengths only.",
                "refuted": "Keep a copy of the files with their hashes: here a pin does not give the same bytes again.",
                "inconclusive": "Pin the full commit hash all the same, and keep hashes of the files that you use.",
            },
            stated={"cpu": "conditional", "full": "conditional"},
        ),
    ),
    plots=(
        Plot(
            "broken-download",
            "What is kept of a broken download",
            "MiB that had arrived",
            "MiB",
            resumed_lines,
        ),
    ),
)

"""Large data sets: does private memory stay as data grow, and is what `datasets` computed once computed once?

Claim     datasets-scale-past-memory (lecture 1)
Refuted   if reading every row once takes private memory that grows with the data, for rows of each length; conditional if
          another operation grows, or `map` gives a stale result or computes the same twice
Control   the same rows kept in memory; the same as a list of Python objects; nothing to find fault with
Run       lab run large_datasets --profile cpu

No memory is limited: what is judged is a slope over sizes, up to the profile's largest. Seeds repeat to a tenth of a
megabyte, so a size counts once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from pydantic import Field

from lab.claims import Claim, Control, Evidence, Experiment, Finding, over_answers
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import LargeDataset, TrialSpec
from lab.statistics import Answer, Interval, lies_within, slope

NAME = "large_datasets"

# Bytes of private memory that each further byte of data may take: at one in a hundred a machine reads data a hundred times
# its memory. Python objects take one or more.
GROWTH = 0.01

OPERATIONS = ("iterate", "random", "shuffle", "sample", "filter", "map", "stream")
"""The first is the core of the claim; the others are what else the library offers."""

PLOTTED = ("iterate", "shuffle", "map", "stream")


class Rows(Section):
    """Rows of one length in data sets of several: some written for each seed, the largest once."""

    row_bytes: Count
    gigabytes: tuple[Rate, ...] = Field(min_length=1)
    once: tuple[Rate, ...] = ()


class Params(Section):
    """How large the data sets are, and those that are held in memory."""

    seeds: Count
    mapped: tuple[Rows, ...] = Field(min_length=1)
    held: Rows


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """The largest first, so that small ones fill the time of the other threads."""
    specs = [spec for rows in params.mapped for spec in _specs("mapped", rows, params.seeds)]
    specs += [spec for way in ("in-memory", "objects") for spec in _specs(way, params.held, params.seeds)]
    return sorted(specs, key=lambda spec: -spec.settings.total_bytes)  # type: ignore[union-attr]


def _specs(way: str, rows: Rows, seeds: int) -> list[TrialSpec]:
    wanted = [(gigabytes, seed) for gigabytes in rows.gigabytes for seed in range(seeds)]
    wanted += [(gigabytes, 0) for gigabytes in rows.once]
    return [
        TrialSpec(
            experiment=NAME,
            name=f"{way}-{rows.row_bytes}-{gigabytes * 1000:g}mb-seed{seed}",
            arm=way,
            settings=LargeDataset.model_validate(
                {"total_bytes": round(gigabytes * 1e9), "row_bytes": rows.row_bytes, "way": way, "seed": seed}
            ),
        )
        for gigabytes, seed in wanted
    ]


# Judge ----------------------------------------------------------------------------------------------------------


def judge(evidence: Evidence) -> Finding:
    """For each length of rows, whether each operation's private memory grows; and what `map` computes again."""
    every = evidence.select("mapped")
    by_length = {length: [r for r in every if r.setting("row_bytes") == length] for length in _lengths(every)}
    core = {length: growth(records, "iterate") for length, records in by_length.items()}
    effect, unit = core[min(core)], "bytes of private memory per byte of data iterated over"
    answers: dict[str, Answer] = {f"iterate, rows of {n} B": _constant(found) for n, found in core.items()}
    if set(answers.values()) == {"no"}:
        grown = ", ".join(f"{found.estimate:.2g} for rows of {n} B" for n, found in core.items())
        return Finding.of("refuted", effect, unit, f"bytes of private memory per byte of data iterated over: {grown}")
    if wrong := [op for op in OPERATIONS if any(r.figure(f"{op}_right") != 1 for r in every)]:
        return Finding.of("refuted", effect, unit, f"other rows than there are: {', '.join(wrong)}")
    objects = growth(evidence.select("objects"), "iterate")
    if _constant(objects) != "no":
        return Finding.of("inconclusive", effect, unit, f"Python objects do not show in the count of memory: {objects}")
    reasons = []
    grows = dict(zip(answers, core.values(), strict=True))
    for length, records in by_length.items():
        for operation in OPERATIONS[1:]:
            found = growth(records, operation)
            answers[f"{operation}, rows of {length} B"] = answer = _constant(found)
            grows[f"{operation}, rows of {length} B"] = found
            if answer != "yes":
                decided = "grows by" if answer == "no" else "undecided, grows by"
                reasons.append(f"{operation} of rows of {length} B {decided} {found.estimate:.2g} bytes a byte")
    for fact, holds in MAP.items():
        answers[fact] = "yes" if all(map(holds, every)) else "no"
        if answers[fact] == "no":
            reasons.append(f"not so that {fact}")
    reasons += [
        f"iterating grows by {max(found.estimate for found in core.values()):.2g}, Python objects by {objects.estimate:.2g}",
        f"a second map takes {fmean(r.figure('map_again_seconds') / r.figure('map_seconds') for r in every):.2g} of the first",
        *(_row_time(length, records) for length, records in by_length.items()),
    ]
    flips = _flips(answers, grows, by_length) if len(set(answers.values())) > 1 else ""
    return Finding.of(over_answers(answers.values()), effect, unit, "; ".join(reasons), flips)


def _flips(
    answers: Mapping[str, Answer], grows: Mapping[str, Interval], by_length: Mapping[int, Sequence[Record]]
) -> str:
    """What grows by GROWTH or less and what by more, from which length of rows on a full shuffle is too, and what `map` misses."""
    parts = []
    for answer, words in (("yes", "at most"), ("no", "more than"), ("undecided", "undecided against")):
        told = [f"{name} {found:.2g}" for name, found in grows.items() if answers[name] == answer]
        parts += [f"{words} {GROWTH:g} bytes of private memory a byte of data: {', '.join(told)}"] if told else []
    if "no" in {answers[f"shuffle, rows of {length} B"] for length in by_length}:
        taken = {
            length: growth(found, "shuffle").estimate * _bytes(found[0]) / found[0].figure("rows")
            for length, found in by_length.items()
        }
        each = " and ".join(f"{size:.0f} bytes for a row of {length} B" for length, size in taken.items())
        longest = max(taken.values()) / GROWTH
        parts.append(f"a full shuffle takes {each}, which are {GROWTH:g} a byte where rows are of {longest:,.0f} B")
    parts += [f"for no length of rows {fact}" for fact in MAP if answers[fact] == "no"]
    return "; ".join(parts)


MAP = {
    "a function is called once for each row, and not again for the same map in another process": lambda r: (
        (r.figure("map_calls"), r.figure("map_again_calls")) == (r.figure("rows"), 0)
    ),
    "a function is called again when a value that it captures has changed": lambda r: (
        r.figure("captured_calls") == r.figure("few")
    ),
    "a function is called again when the file that it is imported from has changed": lambda r: (
        r.figure("edited_stale") == 0
    ),
}


def growth(records: Sequence[Record], operation: str) -> Interval:
    """Private bytes for each further byte of data, over the sizes, each the mean of its seeds.

    Two sizes alone, of what is held in memory, have a slope and no interval: there the seeds are the points.
    """
    points = [(r.figure("data_bytes"), r.figure(f"{operation}_private_bytes")) for r in records]
    sizes = [r.setting("total_bytes") for r in records]
    if len(set(sizes)) > 2:
        by_size = [
            [point for size, point in zip(sizes, points, strict=True) if size == each] for each in sorted(set(sizes))
        ]
        points = [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in by_size]
    return slope([x for x, _ in points], [y for _, y in points])


def _constant(grown: Interval) -> Answer:
    return lies_within(grown, -math.inf, GROWTH)


def _lengths(records: Sequence[Record]) -> list[int]:
    return sorted({r.setting("row_bytes") for r in records})


def _row_time(length: int, records: Sequence[Record]) -> str:
    """How the time of a row in the largest data set compares with that in the smallest; reported, not judged."""
    least, most = min(records, key=_bytes), max(records, key=_bytes)
    seconds = [record.figure("iterate_seconds") / record.figure("rows") for record in (least, most)]
    drawn = [record.figure("random_seconds") for record in (least, most)]
    return (
        f"in {_bytes(most) / _bytes(least):.0f} times the data a row of {length} B takes {seconds[1] / seconds[0]:.2g} times the "
        f"time in order, {drawn[1] / drawn[0]:.2g} at random"
    )


def _bytes(record: Record) -> float:
    return record.figure("data_bytes")


# Controls -------------------------------------------------------------------------------------------------------


def flawless(evidence: Evidence) -> Evidence:
    """Every operation is right and takes 10 MB whatever it reads, and an edited function is noticed."""
    best = {"edited_stale": 0.0, "map_again_calls": 0.0}
    for operation in OPERATIONS:
        best |= {f"{operation}_private_bytes": 1e7, f"{operation}_right": 1.0}

    def changed(record: Record) -> dict[str, float]:
        if record.spec.arm != "mapped":
            return {}
        return best | {"map_calls": record.figure("rows"), "captured_calls": record.figure("few")}

    return Evidence([*evidence.select("mapped"), *evidence.select("objects")]).with_figures(changed)


# Plot -----------------------------------------------------------------------------------------------------------


def memory_lines(evidence: Evidence) -> dict[str, Line]:
    """Private MB over GB of data, for the longest rows; beside them what is resident with the page cache."""
    mapped = evidence.select("mapped")
    longest = [r for r in mapped if r.setting("row_bytes") == max(_lengths(mapped))]
    lines = {operation: _line(longest, f"{operation}_private_bytes") for operation in PLOTTED}
    lines["iterate, with the page cache"] = _line(longest, "iterate_resident_bytes")
    lines["kept in memory"] = _line(evidence.select("in-memory"), "iterate_private_bytes")
    lines["Python objects"] = _line(evidence.select("objects"), "iterate_private_bytes")
    return lines


def _line(records: Sequence[Record], figure: str) -> Line:
    """Means over the seeds."""
    lengths = sorted({r.setting("total_bytes") for r in records})
    means = [fmean(r.figure(figure) for r in records if r.setting("total_bytes") == length) for length in lengths]
    return Line([length / 1e9 for length in lengths], [mean / 1e6 for mean in means])


EXPERIMENT = Experiment(
    name=NAME,
    title="Large data sets",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="datasets-scale-past-memory",
            statement="datasets handles large data simply and efficiently",
            lecture="1",
            tiers=("cpu",),
            threshold=f"the 95 % interval of private memory's growth at most {GROWTH:.0%} of the data's, for every operation and "
            "length of row; a map computed once, and again when its function has changed",
            scope="Arrow files of up to the profile's largest (cpu: 2 GB), on a local disk, a number and a text in each row; no "
            "memory was limited, growth is a slope over sizes; anonymous resident memory; times are reported, not judged",
            judge=judge,
            controls={
                "the rows kept in memory": Control(
                    lambda evidence: evidence.replace("mapped", by="in-memory"), "refuted"
                ),
                "the rows as Python objects": Control(
                    lambda evidence: evidence.replace("mapped", by="objects"), "refuted"
                ),
                "nothing to find fault with": Control(flawless, "supported"),
            },
            advice={
                "supported": "Leave data on the disk and use map, filter and streaming freely: memory does not limit them.",
                "conditional": "Leave data on the disk; stream short rows with a buffer instead of a full shuffle, and clear "
                "the cache after editing an import.",
                "refuted": "Count on the data's own bytes in memory; take shards that fit.",
                "inconclusive": "Leave data on the disk, and watch the private memory of a short run before you start a long one.",
            },
            stated={"cpu": "conditional", "full": "conditional"},
        ),
    ),
    plots=(
        Plot("memory-by-data", "Private memory over data", "GB of text", "MB", memory_lines, log_x=True, log_y=True),
    ),
)

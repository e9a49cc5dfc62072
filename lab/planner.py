"""What fits on a card: a price set against its memory, the largest batch and length, and a sweep over both."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lab.cards import CONTEXT_BYTES, GIB, card_bytes, cautions, shown_bytes, slack, usable_bytes
from lab.errors import LabError
from lab.memory.architecture import Architecture
from lab.memory.workload import Prediction, Workload, targets_of
from lab.pricing import predict

# Answers --------------------------------------------------------------------------------------------------------

MOST = 2**20
"""The largest batch that is asked about."""

GRAIN = 64
"""The longest sequence is told in multiples of so many tokens."""


class Answer:
    """A workload, its price and what that means for its card. What costs more predictions is found when asked for.

    Attributes:
        prediction: bytes of the workload as asked.
        shown_bytes: what the card will show.
        card_bytes: memory of the card; None if none is named, and then nothing else about it is known.
    """

    def __init__(self, workload: Workload, quick: bool = False, confirm: bool = True) -> None:
        self.workload, self.quick, self.confirm = workload, quick, confirm
        self.card_bytes = card_bytes(workload)
        self._prices: dict[str, Prediction] = {}
        self.prediction = self.price(workload)
        self.shown_bytes = shown_bytes(self.prediction.peak_bytes, quick)

    def price(self, workload: Workload) -> Prediction:
        """A workload, this one or a like one, predicted by the same engine, once."""
        key = workload.model_dump_json()
        if key not in self._prices:
            self._prices[key] = predict(workload, self.quick)
        return self._prices[key]

    @property
    def fits(self) -> bool | None:
        """Whether the card holds it; None if none is named."""
        return None if self.card_bytes is None else self.takes(self.card_bytes, self.prediction)

    def takes(self, total_bytes: int, prediction: Prediction) -> bool:
        """Whether a card of so many bytes holds what was predicted."""
        return prediction.peak_bytes <= usable_bytes(total_bytes, self.quick)

    @property
    def spare_bytes(self) -> int | None:
        """What the card has beyond what is needed; less than 0 where it does not fit."""
        return None if self.card_bytes is None else self.card_bytes - self.shown_bytes

    @cached_property
    def largest_batch(self) -> int | None:
        """The largest micro-batch that fits, 0 if none does; not `confirm`ed, it is read off the closed form."""
        return self._largest("batch", 1, MOST)

    @cached_property
    def longest_sequence(self) -> int | None:
        """The longest sequence that fits at this batch, in tokens, a multiple of GRAIN; 0 if not even that fits."""
        longest = positions(self.workload)
        found = self._largest("length", GRAIN if longest >= 2 * GRAIN else 1, longest)
        return max(found or 0, self.workload.length) if self.fits else found

    def _largest(self, name: str, grain: int, most: int) -> int | None:
        if self.card_bytes is None:
            return None
        room, now = usable_bytes(self.card_bytes, self.quick), max(1, getattr(self.workload, name) // grain)
        most = max(most // grain, now)

        def changed(n: int) -> Workload:
            return with_changes(self.workload, **{name: n * grain})

        hint = None if self.quick else self._hint(changed, room, now, most)
        if hint is not None and not self.confirm:
            return grain * (max(hint, now) if self.fits else min(hint, now - 1))
        known = [now] if changed(now) == self.workload else []
        guesses = [now] if hint is None else [*known, hint, hint + 1]
        tries = None if self.confirm or self.quick else 2
        return grain * largest_that_fits(lambda n: self.price(changed(n)), room, guesses, most, tries)

    def _hint(self, changed: Callable[[int], Workload], room: int, now: int, most: int) -> int | None:
        """The largest n by the closed form, scaled so that it agrees with the simulation about the workload as asked."""
        try:
            scale = self.prediction.peak_bytes / predict(self.workload, quick=True).peak_bytes
            return largest_that_fits(lambda n: predict(changed(n), quick=True), int(room / scale), [now], most)
        except LabError:  # it covers less than the simulation
            return None

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of the contract."""
        predicted = self.prediction
        return {
            "peak_bytes": predicted.peak_bytes,
            "steady_bytes": predicted.steady_bytes,
            "parts": dict(predicted.parts),
            "phases": dict(predicted.phases),
            "peak_phase": predicted.peak_phase,
            "parameters": dict(predicted.parameters),
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "device_bytes": predicted.peak_bytes,
            "host_bytes": predicted.host_bytes,
            "shown_bytes": self.shown_bytes,
            "card_bytes": self.card_bytes,
            "assumptions": {**self.assumptions(), **predicted.assumptions},
        }

    def assumptions(self) -> dict[str, Any]:
        """What was taken, by word or by default, and what the card is thought to lose."""
        w = self.workload
        names = ("method", "dtype", "optimizer", "batch", "length", "accumulation", "checkpointing", "loss", "gpu")
        return {
            "engine": "closed form" if self.quick or w.inference else "simulation",
            **{name: getattr(w, name) for name in names},
            "targets": list(targets_of(w)),
            "slack": f"torch reserves {slack(self.quick):.0%} more than is allocated at the peak",
            "cautions": cautions(w),
            "context": f"CUDA takes {CONTEXT_BYTES / GIB:.1f} GiB outside torch's allocator",
        }


def answer(workload: Workload, quick: bool = False, confirm: bool = True) -> Answer:
    """Price the workload, for its card if it names one."""
    return Answer(workload, quick, confirm)


def with_changes(workload: Workload, **changes: Any) -> Workload:
    """The workload with other values, which are not checked."""
    return workload.model_copy(update=changes)


def positions(workload: Workload) -> int:
    """The longest sequence that the model takes under this method."""
    return max(1, Architecture.of(workload.config).positions - workload.tokens_in_front)


def largest_that_fits(
    price: Callable[[int], Prediction], room: int, guesses: Sequence[int], most: int, tries: int | None = None
) -> int:
    """The largest n up to `most` whose peak is within `room` bytes; 0 if there is none.

    Every phase grows about linearly with n, so after the guesses the line through the last two says where to look next.
    What is returned was priced, and so was the next larger n, unless `tries` predictions were too few: then it is the
    line's word.
    """
    seen: dict[int, Prediction] = {}
    fits, fails = 0, most + 1
    while fails - fits > 1:
        guesses = [n for n in guesses if fits < n < fails]
        # The line may creep along a curve; halving does not.
        line = guesses[0] if guesses else _crossing(seen, room, most) if len(seen) < 8 else (fits + fails) // 2
        if len(seen) == tries:
            return min(max(line, fits), fails - 1)
        n = min(max(line, fits + 1), fails - 1)
        seen[n] = price(n)
        if seen[n].peak_bytes <= room:
            fits = n
        else:
            fails = n
    return fits


def _crossing(seen: Mapping[int, Prediction], room: int, most: int) -> int:
    """Where the first phase passes `room`, by the line through the last two n.

    After a single n the line starts from what is held between updates, which the optimizer's step is not expected to leave.
    """
    *_, before, n = [0, *seen]
    found = [most]
    for phase, peak in seen[n].phases.items():
        start = seen[before].phases[phase] if before else peak if phase == "step" else seen[n].steady_bytes
        slope = (peak - start) / (n - before)
        if slope > 0:
            found.append(int(n + (room - peak) // slope))
    return min(found)


# Sweeps ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One point of a sweep: the peak at a batch and a length, and whether it fits (None without a card)."""

    batch: int
    length: int
    peak_bytes: int
    fits: bool | None


def read_ranges(texts: Sequence[str], workload: Workload) -> dict[str, list[int]]:
    """`batch=1..64`, `length=512..8192` as what is swept: doublings within the range; the workload's own without one.

    Raises:
        LabError: it is not written so.
    """
    found = {"batch": [workload.batch], "length": [workload.length]}
    for text in texts:
        match = re.fullmatch(r"(\w+)=(\d+)(?:\.\.(\d+))?", text)
        if not match or match[1] not in found:
            raise LabError(f"sweep: '{text}' is no range. Write batch=1..64 or length=512..8192, or both.")
        low, high = int(match[2]), int(match[3] or match[2])
        if not 1 <= low <= high:
            raise LabError(f"sweep: '{text}' goes from {low} to {high}; it must rise from at least 1. Correct it.")
        found[match[1]] = [low << n for n in range((high // low).bit_length())]
    return found


def sweep(workload: Workload, batches: Sequence[int], lengths: Sequence[int], quick: bool = False) -> Iterator[Cell]:
    """Price every batch at every length."""
    for length in lengths:
        for batch in batches:
            priced = answer(with_changes(workload, batch=batch, length=length), quick)
            yield Cell(batch, length, priced.prediction.peak_bytes, priced.fits)

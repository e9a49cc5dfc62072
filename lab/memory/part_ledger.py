"""A ledger that knows at every moment which part holds how many bytes, and so what the peak consists of."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

from torch import Tensor, UntypedStorage

from lab.memory.ledger import Ledger, _Entry, _rounded, storages_of
from lab.memory.workload import allocated_bytes


class PartLedger(Ledger):
    """Holds every storage under the part that is current at its birth, until `assign` says otherwise.

    Attributes:
        part: the name under which storages born from now on are held.
        logits_width: what is born with this last dimension is held under "logits"; None: nothing is.
        held: live bytes by part.
        held_at_peak: `held` at the highest moment of each phase since `reset`.
    """

    def __init__(self, round_to: int = 1, device: str | None = None) -> None:
        super().__init__(round_to, device)
        self.part = "other"
        self.logits_width: int | None = None
        self.held: Counter[str] = Counter()
        self.held_at_peak: dict[str, dict[str, int]] = {}
        self._parts: dict[_Entry, str] = {}

    def round(self, size: int) -> int:
        """Bytes that a storage of `size` bytes counts as."""
        return _rounded(size, self.round_to)

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Hold tensors under another part from now on, whether they were known before or not."""
        tensors = list(tensors)
        self.adopt(tensors)
        for key in storages_of(tensors):
            if entry := self._entries.get(key):
                self.held[self._parts[entry]] -= entry.size
                self.held[part] += entry.size
                self._parts[entry] = part

    def reset(self) -> None:
        """Forget the peaks; the current phase's starts again at `live_bytes`."""
        super().reset()
        self.held_at_peak = {self.phase: dict(self.held)}

    def enter_phase(self, name: str) -> None:
        """Close the current phase; the peak of the new one is at least `live_bytes`."""
        before = self.peaks.get(name, -1)
        super().enter_phase(name)
        if self.peaks[name] > before:
            self.held_at_peak[name] = dict(self.held)

    def _set_size(self, entry: _Entry, size: int) -> None:
        newborn = "logits" if entry.last_dimension == self.logits_width else self.part
        size = self.round(size)
        self.live_bytes += size - entry.size
        self.held[self._parts.setdefault(entry, newborn)] += size - entry.size
        entry.size = size
        if self.live_bytes > self.peaks[self.phase]:
            self.peaks[self.phase] = self.live_bytes
            self.held_at_peak[self.phase] = dict(self.held)

    def _release(self, key: int, reference: weakref.ref[UntypedStorage]) -> None:
        entry = self._entries[key]
        super()._release(key, reference)
        self.held[self._parts.pop(entry)] -= entry.size


class AllocatorLedger(PartLedger):
    """Rounds as torch's CUDA allocator does."""

    def round(self, size: int) -> int:
        """Bytes that the allocator counts as allocated for a request."""
        return allocated_bytes(size)

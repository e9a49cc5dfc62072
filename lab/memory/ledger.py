"""A byte-exact ledger of live tensor storages, on real tensors.

Every storage counts once, however many views or tied parameters share it, from the operator that returns it until
its last owner (a Python name, the autograd graph) lets go.

Limits: scratch memory inside one kernel and the slack of a caching allocator pass unseen (on CUDA the
allocator's own peaks are kept beside the ledger's); so does a tensor made outside until it is adopted or an
operator returns it. One process, one device, no compiled model.

Source: torch.distributed._tools.mem_tracker hears storages the same way; it fails on frozen parameters.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, UntypedStorage, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lab.errors import LabError
from lab.memory.workload import allocated_bytes


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested mappings, sequences and plain objects (a QuantState of bitsandbytes, say)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple | set):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from tensors_in(vars(value))


def storages_of(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """The distinct storages behind tensors, by id; of wrapper subclasses and sparse tensors, the parts'."""
    found: dict[int, UntypedStorage] = {}
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            found |= storages_of(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        elif tensor.layout is torch.sparse_coo:
            found |= storages_of([tensor._indices(), tensor._values()])
        elif torch._C._has_storage(tensor):
            storage = tensor.untyped_storage()
            found[id(storage)] = storage
    return found


def held_bytes(tensors: Iterable[Tensor], round_to: int = 1) -> int:
    """Bytes of the distinct storages behind tensors: ties count once, a view as all that it keeps alive."""
    return sum(_rounded(storage.nbytes(), round_to) for storage in storages_of(tensors).values())


def _rounded(size: int, round_to: int) -> int:
    return -(-size // round_to) * round_to


def weights(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and what bitsandbytes hangs on them: quant_state with its tables, CB, SCB."""
    for parameter in model.parameters():
        yield parameter
        yield from tensors_in([getattr(parameter, name, None) for name in ("quant_state", "CB", "SCB")])
    yield from model.buffers()
    for module in model.modules():  # from its first forward on, Linear8bitLt keeps CB and SCB in a MatmulLtState
        if hasattr(state := getattr(module, "state", None), "SCB"):
            yield from tensors_in(state)


def gradients(model: nn.Module) -> Iterator[Tensor]:
    """The gradients that exist now."""
    return (parameter.grad for parameter in model.parameters() if parameter.grad is not None)


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper: the one that has the state and fires step hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def optimizer_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """What the optimizer holds: its state, and the parameters it updates (master weights, where not the model's own)."""
    yield from tensors_in(list(optimizer.state.values()))
    yield from tensors_in([group["params"] for group in optimizer.param_groups])


PART_OF_PHASE = {"forward": "activations", "backward": "temporaries", "step": "temporaries"}
"""What a storage counts as from its birth on, by the first word of the phase; "other" in any other phase."""


@dataclass(frozen=True)
class Parts:
    """Bytes held at one moment, by part. Each storage is in one."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0  # what the forward pass made; casts of weights under autocast are here
    logits: int = 0  # the head's output, its fp32 copy, the log-probabilities that the loss saves, their gradients
    temporaries: int = 0  # made in backward (a checkpoint's replay too) or in the step
    inputs: int = 0
    other: int = 0  # the rest: batches fetched ahead, the running loss

    @property
    def total(self) -> int:
        """Live bytes at that moment."""
        return sum(getattr(self, part.name) for part in fields(self))


class _Entry:
    """One live storage: the part it is in, what tells of its release, its rounded bytes."""

    __slots__ = ("part", "reference", "size")

    def __init__(self, part: str, reference: weakref.ref[UntypedStorage]) -> None:
        self.part, self.reference, self.size = part, reference, 0


class Ledger(TorchDispatchMode):
    """Counts live storages while it is entered, and hears releases ever after.

    Autograd carries the mode, with its other thread-local state, to the threads on which CUDA runs backward.

    Args:
        round_to: a storage counts as the next multiple of this; 512 is the CUDA allocator's rounding.
        device: count this type of device only, "cuda" say; None counts all but "meta".
    Attributes:
        live_bytes: bytes of all live storages.
        held: the same by part: that of the phase of a storage's birth, until `assign` says otherwise.
        logits_width: what is born with this last dimension counts as logits; None: nothing does.
        peaks: the highest `live_bytes` of each phase since `reset`.
        held_at_peak: `held` at that moment.
        allocator_peaks: on CUDA, max_memory_allocated and max_memory_reserved of each phase since `reset`.
    """

    def __init__(self, round_to: int = 1, device: str | None = None) -> None:
        super().__init__()
        if round_to < 1:
            raise LabError(f"Ledger: round_to is {round_to}; it must be at least 1. Take 1 for bytes, 512 for CUDA.")
        self.round_to, self.device = round_to, device
        self.live_bytes = 0
        self.held: Counter[str] = Counter()
        self.logits_width: int | None = None
        self.phase = "idle"
        self.follows_autograd = False  # the "backward" phase begins and ends with the engine; set by `watch`
        self.peaks: dict[str, int] = {"idle": 0}
        self.held_at_peak: dict[str, dict[str, int]] = {"idle": {}}
        self.allocator_peaks: dict[str, tuple[int, int]] = {}
        self._entries: dict[int, _Entry] = {}
        self._replaced_resize: list[Any] = []

    def reset(self) -> None:
        """Forget the peaks; the current phase's starts again at `live_bytes`."""
        self._read_allocator()
        self.peaks, self.held_at_peak = {self.phase: self.live_bytes}, {self.phase: dict(self.held)}
        self.allocator_peaks = {}

    def enter_phase(self, name: str) -> None:
        """Close the current phase; the peak of the new one is at least `live_bytes`."""
        self._read_allocator()
        self.phase = name
        self._note_peak()

    def _note_peak(self) -> None:
        if self.live_bytes > self.peaks.get(self.phase, -1):
            self.peaks[self.phase] = self.live_bytes
            self.held_at_peak[self.phase] = dict(self.held)

    def _read_allocator(self) -> None:
        if self.device == "cuda":
            allocated, reserved = self.allocator_peaks.get(self.phase, (0, 0))
            self.allocator_peaks[self.phase] = (
                max(allocated, torch.cuda.max_memory_allocated()),
                max(reserved, torch.cuda.max_memory_reserved()),
            )
            torch.cuda.reset_peak_memory_stats()

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors made outside: parameters, buffers, a batch. What is known is not counted again."""
        for tensor in tensors:
            if tensor.device.type == "meta" or (self.device and tensor.device.type != self.device):
                continue
            for key, storage in storages_of([tensor]).items():
                if key not in self._entries:
                    # PyTorch keeps a storage's Python object, and so its id, for as long as the memory.
                    reference = weakref.ref(storage, partial(self._release, key))
                    self._entries[key] = _Entry(self._part_at_birth(tensor), reference)
                self._set_size(self._entries[key], storage.nbytes())

    def _part_at_birth(self, tensor: Tensor) -> str:
        if self.logits_width and tensor.dim() and tensor.shape[-1] == self.logits_width:
            return "logits"
        return PART_OF_PHASE.get(self.phase.partition(" ")[0], "other")

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors under another part from now on, whether they were known before or not."""
        tensors = list(tensors)
        self.adopt(tensors)
        self._move((self._entries[key] for key in storages_of(tensors) if key in self._entries), part)

    def retire(self) -> None:
        """What an earlier pass made and is alive still (its loss, say) counts as other from now on."""
        made = {*PART_OF_PHASE.values(), "logits"}
        self._move((entry for entry in list(self._entries.values()) if entry.part in made), "other")

    def _move(self, entries: Iterable[_Entry], part: str) -> None:
        for entry in entries:
            self.held[entry.part] -= entry.size
            self.held[part] += entry.size
            entry.part = part

    @property
    def parts(self) -> Parts:
        """What is live now."""
        return Parts(**self.held)

    def round(self, size: int) -> int:
        """Bytes that a storage of `size` bytes counts as."""
        return _rounded(size, self.round_to)

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the distinct storages behind tensors, rounded as the ledger rounds."""
        return held_bytes(tensors, self.round_to)

    def _set_size(self, entry: _Entry, size: int) -> None:
        size = self.round(size)
        self.live_bytes += size - entry.size
        self.held[entry.part] += size - entry.size
        entry.size = size
        self._note_peak()

    def _release(self, key: int, _: weakref.ref[UntypedStorage]) -> None:
        entry = self._entries.pop(key)
        self.live_bytes -= entry.size
        self.held[entry.part] -= entry.size

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True wraps every dispatch for the sake of torch.compile

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # of a shadow, which is asked for it more often than for all else
            return type(args[0]).__torch_dispatch__(func, types, args)
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # wrapper subclasses (torchao's states) unfold into plain operators first
        if self.follows_autograd and (torch._C._current_graph_task_id() != -1) != (self.phase == "backward"):
            self.enter_phase("idle" if self.phase == "backward" else "backward")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.adopt([result])
        elif isinstance(result, list | tuple):
            self.adopt(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def __enter__(self) -> Self:
        self._replaced_resize.append(original := UntypedStorage.resize_)

        def resize(storage: UntypedStorage, size: int) -> Any:  # no operator, so no dispatch
            result = original(storage, size)
            if entry := self._entries.get(id(storage)):
                self._set_size(entry, storage.nbytes())
            return result

        UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        UntypedStorage.resize_ = self._replaced_resize.pop()  # type: ignore[method-assign]
        super().__exit__(*exception)


class AllocatorLedger(Ledger):
    """Rounds as torch's CUDA allocator does."""

    def round(self, size: int) -> int:
        """Bytes that the allocator counts as allocated for a request."""
        return allocated_bytes(size)

"""What to change where a workload does not fit: remedies in order of cost, then a smaller model or a bigger card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lab.cards import CONTEXT_BYTES, DRIVER_SHARE, GPUS, card_bytes, shown_bytes
from lab.errors import LabError
from lab.memory.architecture import Architecture
from lab.memory.workload import Prediction, Workload
from lab.planner import Answer, positions, with_changes
from lab.pricing import bundled_configs

WORTH_IT = 0.01
"""A remedy that lowers the peak by less than this share is left out."""


@dataclass(frozen=True)
class Remedy:
    """A change that lowers the peak.

    Attributes:
        relieves: the parts that it lowers; it is tried only where they hold something at the peak.
        changes: the workload changed: nothing where it does not apply, several from mild to strong.
        time, quality: what it costs, in words.
    """

    name: str
    relieves: tuple[str, ...]
    changes: Callable[[Workload], Iterable[Workload]]
    time: str
    quality: str


@dataclass(frozen=True)
class Rung:
    """A step of the ladder: a remedy on top of those before it.

    Attributes:
        options: what to change on the command line.
        workload: with this remedy and all before it.
        needed_bytes: what the card would show.
    """

    name: str
    options: str
    workload: Workload
    prediction: Prediction
    needed_bytes: int
    fits: bool
    time: str
    quality: str


def ladder(given: Answer) -> Iterator[Rung]:
    """Remedies for a workload that does not fit, in order of cost, each on top of the last, until one fits.

    Then the smallest card that takes the workload as it was asked for. Where no remedy is enough: the largest bundled
    model that fits with all of them, and the smallest card that takes this model with them.
    """
    if given.fits is not False:
        return
    current, prediction, fits = given.workload, given.prediction, False
    tried: set[tuple[str, str]] = set()
    while not fits and (rung := _next_rung(given, current, prediction, tried)):
        yield rung
        current, prediction, fits = rung.workload, rung.prediction, rung.fits
    if not fits and (smaller := _smaller_model(given, current)):
        yield smaller
    bigger = _bigger_card(given, given.workload, "as asked")
    if not bigger and not fits:
        bigger = _bigger_card(given, current, "with all of the above")
    if bigger:
        yield bigger


def _next_rung(given: Answer, current: Workload, prediction: Prediction, tried: set[tuple[str, str]]) -> Rung | None:
    """The cheapest remedy that lowers the peak. One that did not is tried again once the peak is in another phase."""
    for remedy in REMEDIES:
        held = sum(prediction.parts.get(part, 0) for part in remedy.relieves)
        attempt = (remedy.name, prediction.peak_phase)
        if attempt in tried or held < WORTH_IT * prediction.peak_bytes:
            continue
        tried.add(attempt)
        best, lowest = None, prediction.peak_bytes
        for workload in remedy.changes(current):
            try:
                lower = given.price(workload)
            except LabError:
                break
            if lower.peak_bytes > (1 - WORTH_IT) * lowest:
                break
            best, lowest = _rung(given, remedy.name, current, workload, remedy.time, remedy.quality), lower.peak_bytes
            if best.fits:
                break
        if best:
            return best
    return None


def _rung(given: Answer, name: str, before: Workload, after: Workload, time: str, quality: str) -> Rung:
    prediction = given.price(after)
    needed = shown_bytes(prediction.peak_bytes, given.quick)
    fits = given.takes(card_bytes(after) or 0, prediction)
    return Rung(name, options(before, after), after, prediction, needed, fits, time, quality)


def options(before: Workload, after: Workload) -> str:
    """What turns one workload into another, as options of `lab fit`."""
    words = []
    for name in Workload.model_fields:
        value = getattr(after, name)
        if value == getattr(before, name) or name in ("config", "vram_gib"):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif value is not None:
            words.append(f"{option} {','.join(value) if isinstance(value, tuple) else value}")
    return " ".join(words)


def _halved_batch(w: Workload) -> Iterator[Workload]:
    """Smaller micro-batches, the update's batch kept: divisors of the batch, each at most half of the one before."""
    batch = w.batch
    while batch > 1:
        batch = max(n for n in range(1, batch // 2 + 1) if w.batch % n == 0)
        yield with_changes(w, batch=batch, accumulation=1 if w.inference else w.batch * w.accumulation // batch)


def _halved_length(w: Workload) -> Iterator[Workload]:
    length = w.length
    while length >= 512:
        length //= 2
        yield with_changes(w, length=length)


def _quantised(w: Workload) -> Iterator[Workload]:
    if w.method == "full" or w.held_as == "nf4":
        return
    method = "qlora" if w.method == "lora" else w.method
    yield with_changes(w, method=method, quantisation="nf4", double_quantisation=True, preparation=None)


def _when(applies: Callable[[Workload], bool], **changes: Any) -> Callable[[Workload], Iterable[Workload]]:
    return lambda w: [with_changes(w, **changes)] if applies(w) else []


_ACTIVATIONS = ("activations", "logits", "temporaries")
_TRAINED = ("gradients", "optimizer", "temporaries")
_ADAMW = ("adamw_torch", "adamw_torch_fused")

REMEDIES = (
    Remedy(
        "fused optimizer step",
        ("temporaries",),
        _when(
            lambda w: w.optimizer == "adamw_torch" and w.stepped_by == "foreach",
            optimizer="adamw_torch_fused",
            step=None,
        ),
        "none: one kernel in place of many",
        "none: the same arithmetic",
    ),
    Remedy(
        "fused attention",
        _ACTIVATIONS,
        _when(lambda w: w.attention == "eager" and not Architecture.of(w.config).scores_capped, attention="sdpa"),
        "saves time",
        "none: the same arithmetic, in blocks (Dao et al. 2022)",
    ),
    Remedy(
        "chunked loss",
        ("logits", "temporaries"),
        _when(lambda w: w.loss in ("full", "full-shifted"), loss="chunked"),
        "a few per cent: the head's product runs again in backward (rule of thumb)",
        "none: the same loss, tile by tile",
    ),
    Remedy(
        "gradient checkpointing",
        ("activations", "temporaries"),
        _when(lambda w: not w.checkpointing, checkpointing=True),
        "about 1.3x: each layer's forward runs twice (rule of thumb)",
        "none: the same gradients",
    ),
    Remedy(
        "smaller micro-batch",
        _ACTIVATIONS,
        lambda w: () if w.inference else _halved_batch(w),
        "none to 1.3x: smaller products fill the card less (rule of thumb)",
        "none: the same update, by accumulation",
    ),
    Remedy(
        "8-bit optimizer",
        ("optimizer", "temporaries"),
        _when(lambda w: w.optimizer in (*_ADAMW, "paged_adamw_32bit"), optimizer="adamw_bnb_8bit", step=None),
        "about none (rule of thumb)",
        "none found in its paper (Dettmers et al. 2022)",
    ),
    Remedy(
        "paged 8-bit optimizer",
        ("optimizer",),
        _when(lambda w: w.optimizer in ("adamw_bnb_8bit", "adamw_8bit"), optimizer="paged_adamw_8bit", step=None),
        "the state crosses the bus where the card is full: up to 2x (rule of thumb)",
        "none: the same arithmetic; it takes memory of the host",
    ),
    Remedy(
        "weights in bf16",
        ("weights", *_TRAINED),
        _when(lambda w: w.dtype == "fp32", dtype="bf16", amp=None),
        "saves time",
        "updates below 0.2 to 0.4 % of a weight are rounded away (8 bits of significand); adapters stay in fp32",
    ),
    Remedy(
        "LoRA",
        _TRAINED,
        _when(lambda w: w.method == "full", method="lora", targets=None),
        "saves time",
        "learns less, forgets less (Biderman et al. 2024)",
    ),
    Remedy(
        "QLoRA",
        ("weights",),
        _quantised,
        "about 1.3x: weights are unpacked at each use (rule of thumb)",
        "close to LoRA's (Dettmers et al. 2023)",
    ),
    Remedy(
        "smaller batch",
        ("kv_cache", "logits"),
        lambda w: _halved_batch(w) if w.inference else (),
        "fewer tokens a second in all",
        "none",
    ),
    Remedy(
        "weights in nf4",
        ("weights",),
        _when(lambda w: w.inference and not w.held_as, quantisation="nf4", double_quantisation=True),
        "slower for large batches, faster for one sequence (rule of thumb)",
        "a little less, more for small models (Dettmers and Zettlemoyer 2023)",
    ),
    Remedy(
        "shorter sequences",
        (*_ACTIVATIONS, "kv_cache"),
        _halved_length,
        "saves time",
        "longer examples are cut or packed anew",
    ),
)
"""The remedies, cheapest first."""


def _smaller_model(given: Answer, workload: Workload) -> Rung | None:
    """The largest bundled model that fits with all remedies; at most four are priced."""
    size = Architecture.of(workload.config).parameters()
    bytes_per_parameter = given.price(workload).peak_bytes / size
    room = (given.card_bytes or 0) - CONTEXT_BYTES
    configs = bundled_configs()
    sizes = {name: Architecture.of(config).parameters() for name, config in configs.items()}
    names = [n for n in sizes if sizes[n] < size and 0.8 * sizes[n] * bytes_per_parameter < room]
    candidates = {}
    for name in sorted(names, key=sizes.__getitem__, reverse=True)[:4]:
        smaller = with_changes(workload, config=configs[name], targets=None)
        smaller = with_changes(smaller, length=min(smaller.length, positions(smaller)))
        candidates[f"smaller model: {name}"] = smaller
    return _first_that_fits(given, workload, candidates, "saves time", "a smaller model knows less")


def _bigger_card(given: Answer, workload: Workload, how: str) -> Rung | None:
    """The smallest card of the table that takes the workload."""
    prediction, least = given.price(workload), (1 + DRIVER_SHARE) * (given.card_bytes or 0)
    # Priced again on each: its cuBLAS may take more, its attention too, and it may lack flash-attn's.
    candidates = {
        f"bigger card, {how}: {gpu.name}": with_changes(workload, gpu=gpu.name, vram_gib=None)
        for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.total_bytes)
        if gpu.total_bytes > least and given.takes(gpu.total_bytes, prediction)
    }
    return _first_that_fits(given, workload, candidates, "none", "none; it costs money")


def _first_that_fits(
    given: Answer, before: Workload, candidates: Mapping[str, Workload], time: str, quality: str
) -> Rung | None:
    """The first of the named candidates that fits; one that the engine does not cover is passed over."""
    for name, after in candidates.items():
        try:
            rung = _rung(given, name, before, after, time, quality)
        except LabError:
            continue
        if rung.fits:
            return rung
    return None

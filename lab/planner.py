"""What fits on a card, and what to change if it does not.

A specification (the options of `lab fit`, or one line of its stream) becomes a Workload; a Workload is priced by the
simulation or, in no time, by the closed form; an Answer sets the price against a card. Nothing here imports torch before
the simulation is asked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from lab.cards import (
    CONTEXT_BYTES,
    DRIVER_SHARE,
    GIB,
    GPUS,
    card_bytes,
    cautions,
    find_gpu,
    shown_bytes,
    slack,
    usable_bytes,
)
from lab.errors import LabError, nearest, unknown
from lab.memory.architecture import FUSED, Architecture
from lab.memory.workload import (
    BYTES,
    PARTS,
    PHASES,
    Prediction,
    Workload,
    check,
    check_length,
    check_scales,
    nf4_tensors,
    targets_of,
    workspace_bytes,
)
from lab.params import parse

# From a specification to a workload ----------------------------------------------------------------------------


def read_spec(spec: Mapping[str, Any]) -> Workload:
    """The workload that a JSON object (or the command line) asks for; null means the default.

    Raises:
        LabError: an unknown key or name, a wrong value, a config that cannot be had or is not covered.
    """
    given = {key: value for key, value in spec.items() if value is not None and key != "id"}
    known = [*Workload.model_fields, "model"]
    for key in given:
        if key not in known:
            guess = nearest(key, known)
            hint = f"Did you mean '{guess}'?" if guess else f"Known: {', '.join(sorted(known))}."
            raise LabError(f"{key} is not a known key. {hint}")
    for key, value in given.items():
        choices = _choices(key)
        if choices and value not in choices:
            raise unknown(key, value, choices)
    if "gpu" in given:
        given["gpu"] = find_gpu(str(given["gpu"])).name
    if isinstance(given.get("targets"), str):
        given["targets"] = tuple(target.strip() for target in given["targets"].split(",") if target.strip())
    if ("model" in given) == ("config" in given):
        both = "model and config are both given" if "model" in given else "model is missing, and so is config"
        raise LabError(f"{both}. Give one: a bundled name, a hub id or a path as model, or the fields as config.")
    if "model" in given:
        given["config"] = load_config(str(given.pop("model")))
    if not isinstance(given["config"], Mapping):
        raise LabError(f"config is {given['config']!r}; it must be an object, as in a config.json. Correct it.")
    if given.get("targets") == ("all-linear",) and given["config"].get("model_type") not in FUSED:
        del given["targets"]  # PEFT's word for what is the default here, but where it takes in the experts
    try:
        workload = parse(Workload, given, "spec")
    except LabError as error:
        raise LabError(str(error).removeprefix("spec: ")) from None
    if not math.isfinite(workload.vram_gib or 0):
        raise LabError(f"vram_gib is {workload.vram_gib}; it must be a number of GiB. Correct it.")
    return workload


def _choices(key: str) -> tuple[str, ...]:
    """The values of a field that is one of several words; none for another field."""

    def words(annotation: Any) -> Iterator[str]:
        for part in get_args(annotation):
            yield from [part] if isinstance(part, str) else words(part)

    return tuple(words(Workload.model_fields[key].annotation)) if key in Workload.model_fields else ()


def methods() -> tuple[str, ...]:
    """The methods that can be priced."""
    return _choices("method")


# Configurations -------------------------------------------------------------------------------------------------

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def load_config(name: str) -> dict[str, Any]:
    """A model's config.json: of a bundled shape, a path (to the file or its folder) or a hub id. No code is run.

    Raises:
        LabError: there is none, it cannot be had, or it is no JSON object.
    """
    from lab.models import shapes

    bundled = shapes()
    if name in bundled:
        return _read_config(bundled[name])
    path = Path(name).expanduser()
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise LabError(f"model: {path.parent} has no config.json. Choose the folder that has it.")
    if path.is_file():
        return _read_config(path)
    if _HUB_ID.fullmatch(name) and path.suffix != ".json":
        return _read_config(_download_config(name))
    if "/" in name or path.suffix == ".json":
        raise LabError(f"model: there is no file or folder {name}. Correct the path.")
    raise unknown("model", name, bundled)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(f"model: {path} cannot be read: {error.strerror}. Make it readable.") from None
    except (ValueError, RecursionError) as error:
        raise LabError(f"model: {path} is not JSON: {error}. Correct it, or download it again.") from None
    if not isinstance(config, dict):
        raise LabError(f"model: {path} holds a {type(config).__name__}, not an object. Choose a config.json.")
    return config


def _download_config(name: str) -> Path:
    """The config.json of a hub repository at revision main, or the cached one where the hub cannot be reached.

    Nothing else is downloaded.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    what: dict[str, str] = {"repo_id": name, "filename": "config.json", "revision": "main"}
    try:
        reachable = True
        try:
            # Fails at once where the download itself would try for 23 s.
            get_hf_file_metadata(hf_hub_url(**what), timeout=10)
        except (errors.HfHubHTTPError, errors.HFValidationError):
            raise
        except Exception:  # whatever the client's transport raises
            reachable = False
        return Path(hf_hub_download(**what, local_files_only=not reachable))
    except errors.GatedRepoError:
        reason = "access to it must be asked for on the hub; log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such repository (or it is private). Correct the name"
    except errors.RemoteEntryNotFoundError:
        reason = "it has no config.json (an adapter, or GGUF files alone?). Name the base model"
    except errors.HFValidationError:
        reason = "this is not how the hub names a repository (owner/name). Correct it"
    except Exception as error:
        kind = "" if isinstance(error, errors.LocalEntryNotFoundError) else f", or broke off ({type(error).__name__})"
        reason = f"the hub cannot be reached{kind}. Connect to it"
    choice = "or choose a bundled model (lab fit --list models) or a path to a config.json."
    raise LabError(f"hub: {name} at revision main: {reason}, {choice}")


# Pricing --------------------------------------------------------------------------------------------------------


def predict(workload: Workload, quick: bool = False) -> Prediction:
    """The memory of the workload: by simulation, or by the closed form if `quick`.

    Raises:
        LabError: the options contradict each other, or the engine does not cover them.
    """
    if workload.inference:
        return predict_inference(workload)
    check(workload)  # the engine does so too, but the simulation only after torch is imported
    engine = "closed_form" if quick else "simulation"
    try:
        return import_module(f"lab.memory.{engine}").predict(workload)
    except LabError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise LabError(f"{engine.replace('_', ' ')}: cannot price this: {type(error).__name__}: {first}") from error


def predict_inference(workload: Workload) -> Prediction:
    """Weights and a full key-value cache, in closed form: decoding the last token of `length`, adapters merged.

    Cache: see `kv_cache_bytes`. A quantised base: see `nf4_tensors`; int8 takes a byte, and 4 for each output.

    Raises:
        LabError: more tokens than the model has positions, or nested scales without nf4.
    Source:
        Pope et al. 2022, section 3.3; Dettmers et al. 2023, section 3 (double quantisation).
    """
    from lab.memory.closed_form import kv_cache_bytes

    shape, width = Architecture.of(workload.config), BYTES[workload.dtype]
    check_length(shape, workload.length)
    check_scales(workload)
    matrices = [
        module.inputs * module.outputs for layer in range(shape.layers) for module in shape.layer_linears(layer)
    ]
    rows = sum(module.outputs for layer in range(shape.layers) for module in shape.layer_linears(layer))
    weights = shape.parameters() * width
    if workload.held_as == "nf4":
        weights += sum(sum(nf4_tensors(matrix, workload.double_quantisation)) - matrix * width for matrix in matrices)
    elif workload.held_as == "int8":
        weights += sum(matrices) * (1 - width) + 4 * rows
    cache = kv_cache_bytes(shape, workload.batch, workload.length, width)
    logits = workload.batch * shape.vocabulary * (width + BYTES["fp32"])
    workspace = workspace_bytes(workload)
    parts = {**dict.fromkeys(PARTS, 0), "weights": weights, "logits": logits, "workspace": workspace, "kv_cache": cache}
    peak = sum(parts.values())
    return Prediction(
        peak_bytes=peak,
        steady_bytes=weights + workspace,
        parts=parts,
        phases={**dict.fromkeys(PHASES, 0), "forward": peak},
        parameters={"total": shape.parameters(), "trainable": 0, "stored": shape.parameters()},
        assumptions={
            "inference": "one token at a time with a full cache, logits of the last position also in fp32, adapters merged; "
            "the activations of a long prompt read in one go are not counted"
        },
    )


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
        longest = _positions(self.workload)
        found = self._largest("length", GRAIN if longest >= 2 * GRAIN else 1, longest)
        return max(found or 0, self.workload.length) if self.fits else found

    def _largest(self, name: str, grain: int, most: int) -> int | None:
        if self.card_bytes is None:
            return None
        room, now = usable_bytes(self.card_bytes, self.quick), max(1, getattr(self.workload, name) // grain)
        most = max(most // grain, now)

        def changed(n: int) -> Workload:
            return _with(self.workload, **{name: n * grain})

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


def _with(workload: Workload, **changes: Any) -> Workload:
    return workload.model_copy(update=changes)


def _positions(workload: Workload) -> int:
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


# The ladder -----------------------------------------------------------------------------------------------------

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
        yield _with(w, batch=batch, accumulation=1 if w.inference else w.batch * w.accumulation // batch)


def _halved_length(w: Workload) -> Iterator[Workload]:
    length = w.length
    while length >= 512:
        length //= 2
        yield _with(w, length=length)


def _quantised(w: Workload) -> Iterator[Workload]:
    if w.method == "full" or w.held_as == "nf4":
        return
    method = "qlora" if w.method == "lora" else w.method
    yield _with(w, method=method, quantisation="nf4", double_quantisation=True, preparation=None)


def _when(applies: Callable[[Workload], bool], **changes: Any) -> Callable[[Workload], Iterable[Workload]]:
    return lambda w: [_with(w, **changes)] if applies(w) else []


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
    from lab.models import shapes

    size = Architecture.of(workload.config).parameters()
    bytes_per_parameter = given.price(workload).peak_bytes / size
    room = (given.card_bytes or 0) - CONTEXT_BYTES
    configs = {name: _read_config(path) for name, path in shapes().items()}
    sizes = {name: Architecture.of(config).parameters() for name, config in configs.items()}
    names = [n for n in sizes if sizes[n] < size and 0.8 * sizes[n] * bytes_per_parameter < room]
    for name in sorted(names, key=sizes.__getitem__, reverse=True)[:4]:
        config = configs[name]
        smaller = _with(workload, config=config, targets=None)
        smaller = _with(smaller, length=min(smaller.length, _positions(smaller)))
        try:
            rung = _rung(given, f"smaller model: {name}", workload, smaller, "saves time", "a smaller model knows less")
        except LabError:
            continue
        if rung.fits:
            return rung
    return None


def _bigger_card(given: Answer, workload: Workload, how: str) -> Rung | None:
    """The smallest card of the table that takes the workload."""
    prediction, least = given.price(workload), (1 + DRIVER_SHARE) * (given.card_bytes or 0)
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.total_bytes):
        if gpu.total_bytes > least and given.takes(gpu.total_bytes, prediction):
            moved = _with(workload, gpu=gpu.name, vram_gib=None)
            try:  # its cuBLAS may take more, its attention too, and it may lack flash-attn's
                rung = _rung(given, f"bigger card, {how}: {gpu.name}", workload, moved, "none", "none; it costs money")
            except LabError:
                continue
            if rung.fits:
                return rung
    return None


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
            priced = answer(_with(workload, batch=batch, length=length), quick)
            yield Cell(batch, length, priced.prediction.peak_bytes, priced.fits)

"""What a person asks for, and what it takes: a specification becomes a workload, a workload is priced.

A specification has the options of `lab fit`, or is one line of its stream. The price is the simulation's or, in no time, that
of the closed form. Nothing here imports torch before the simulation is asked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from lab.cards import find_gpu
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


def bundled_configs() -> dict[str, dict[str, Any]]:
    """The config.json of every bundled shape, by name."""
    from lab.models import shapes

    return {name: _read_config(path) for name, path in shapes().items()}


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

"""The trial that downloads from a hub, through the real clients: cold and warm, before and after `main` moves, through faults."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.hub_client import Client, public_environment
from lab.hub_endpoint import Hub, Kind, Request
from lab.runners import Outcome
from lab.specs import HubDownloads
from lab.workspace import Workspace

MODEL = "lab/tiny-llama"
TABLE, LINES, LARGE = "lab/table", "lab/lines", "lab/large"
PARQUET, JSONL, WEIGHTS = "data/train.parquet", "data/train.jsonl", "model.safetensors"
DAMAGED: dict[str, tuple[str, Kind]] = {
    WEIGHTS: (MODEL, "model"),
    PARQUET: (TABLE, "dataset"),
    JSONL: (LINES, "dataset"),
}
"""The files in which a bit is turned over, each with its repository and kind."""

WORDS = list("abcdefghijklmnop")
ROWS = 400
MIB = 2**20

Order = dict[str, Any]
"""What `lab.hub_client.load` is told."""

Seen = dict[str, Any]
"""What `lab.hub_client.load` answers."""


def download(settings: HubDownloads, workspace: Workspace) -> Outcome:
    """Load what a revision pins and what `main` is, and compare.

    Figures (1 for so, 0 for not so):
        cold_bytes_equal, cold_commit_equal, cold_weights_equal, cold_fingerprint_equal: two loads of one pin, each from
            an empty cache, gave the same files, commit (the pin), weights and tokens, data set fingerprint and rows.
        cold_bytes_committed: the files are those that were committed (public hub: those that it lists hashes of).
        pinned_cold_equal, pinned_warm_equal: the same load after `main` moved, from an empty cache and from one that held
            the pin, is equal in all of these.
        unpinned_cold_changed, unpinned_warm_changed: a load without a revision then gave other files.
        broken_right: files whose connection broke in the middle came whole.
        killed_right: so did one whose download was killed in the middle, downloaded again.
        short_noticed: half a file in place of the whole was refused.
        wire_noticed, cache_noticed: loads of a file with one bit turned over, on the way or in the cache, gave an error or
            the committed bytes; wire_noticed_<suffix> and cache_noticed_<suffix> by file.
        wire_verified, cache_verified: the client's own comparison with the hub's hashes found these files and no other.
        sound_verified: it found nothing in a sound cache.
    Further figures:
        files, cold_bytes, warm_bytes: files of a load, and the bytes that the hub sent for it, cold and with the pin cached.
        cold_requests, warm_requests: how often it was asked.
        killed_bytes_again: bytes sent again after the killed download.
    Series:
        broken_at_bytes, resumed_at_bytes: where connections broke, and from where the client went on.

    With a fault planted, those of loads alone. On the public hub too, where the pin is older than `main`.

    Raises:
        ConnectionError: the public hub cannot be reached.
        ValueError: a public repository has no older commit with the same files.
    """
    if settings.endpoint == "public":
        return _public(settings)
    return _loopback(settings)


# Loopback -------------------------------------------------------------------------------------------------------


def _loopback(settings: HubDownloads) -> Outcome:
    outcome = Outcome(tags={"endpoint": settings.endpoint, "fault": settings.fault or "none"})
    with Hub() as hub, Client(hub.environment()) as client:
        old = _commit(hub, settings.seed, version=0)
        pin: Order = {"model": MODEL, "revision": old[MODEL], "data_sets": {name: old[name] for name in (TABLE, LINES)}}
        head: Order = {"model": MODEL, "revision": None, "data_sets": dict.fromkeys((TABLE, LINES))}
        first, cold = _logged(hub, client, pin, cold=True)
        again = client.ask("load", cold=True, **pin)
        outcome.figures |= _cold(first, again, old[MODEL], _committed(hub, old))
        client.ask("load", **head)
        if settings.fault != "never-moves":
            _commit(hub, settings.seed, version=1)
        if settings.fault == "ignores-revisions":
            hub.ignore_revisions()
        pinned, warm = _logged(hub, client, pin)
        outcome.figures |= {
            "pinned_warm_equal": pinned == first,
            "unpinned_warm_changed": _all_differ(client.ask("load", **head), first),
            "pinned_cold_equal": client.ask("load", cold=True, **pin) == first,
        }
        if settings.fault is None:
            outcome.figures |= _in_the_cache(client, pin, first, old)
        outcome.figures["unpinned_cold_changed"] = _all_differ(client.ask("load", cold=True, **head), first)
        if settings.fault is None:
            outcome.figures |= _on_the_way(hub, client, pin, first, old)
            outcome.figures |= _killed(hub, client, settings.seed)
            broken, outcome.series = _broken(hub, client, settings)
            outcome.figures |= broken
    for state, requests in (("cold", cold), ("warm", warm)):
        outcome.figures |= {f"{state}_bytes": _sent(requests), f"{state}_requests": len(requests)}
    return outcome


def _commit(hub: Hub, seed: int, version: int) -> dict[str, str]:
    """Commit the model and the data sets, and give the commits by repository. Another version has other contents."""
    draw = random.Random(f"{seed} {version}")
    with tempfile.TemporaryDirectory() as scratch:
        _save_model(Path(scratch), draw.randrange(2**31))
        model = hub.commit("model", MODEL, Path(scratch))
    rows = [{"id": i, "text": " ".join(draw.choices(WORDS, k=40))} for i in range(ROWS)]
    return {
        MODEL: model,
        TABLE: hub.commit("dataset", TABLE, {PARQUET: _parquet(rows)}),
        LINES: hub.commit("dataset", LINES, {JSONL: _jsonl(rows)}),
    }


def _save_model(folder: Path, seed: int) -> None:
    """A random Llama of a few thousand parameters and a tokenizer of whole words, as transformers saves them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers.set_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(WORDS) + 1,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: place for place, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import io

    import pyarrow.parquet  # type: ignore[import-untyped]

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import json

    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _committed(hub: Hub, commits: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The hash of every file of each repository at its commit."""
    kinds = dict(DAMAGED.values())
    trees = {name: hub.repositories[kind, name][commits[name]] for name, kind in kinds.items()}
    return {
        name: {path: hashlib.sha256(blob.data).hexdigest() for path, blob in tree.items()}
        for name, tree in trees.items()
    }


def _logged(hub: Hub, client: Client, order: Order, cold: bool = False) -> tuple[Seen, list[Request]]:
    before = len(hub.requests)
    return client.ask("load", cold=cold, **order), hub.requests[before:]


def _sent(requests: Sequence[Request]) -> int:
    """Bytes of file bodies."""
    return sum(request.sent for request in requests if "/resolve/" in request.path)


def _files(seen: Seen) -> dict[str, Any]:
    """The hashes of the files by repository; a download that failed has none."""
    return {MODEL: seen["model"].get("files")} | {name: part.get("files") for name, part in seen["data"].items()}


def _cold(first: Seen, again: Seen, pin: str, committed: Mapping[str, Any]) -> dict[str, Any]:
    whole = all(_files(first).values())
    return {
        "cold_bytes_equal": whole and _files(first) == _files(again),
        "cold_bytes_committed": _files(first) == committed,
        "cold_commit_equal": {first["commit"], again["commit"], first["model"].get("commit")} == {pin},
        "cold_weights_equal": _sound(first["weights"]) and _same(first, again, "weights", "tokens"),
        "cold_fingerprint_equal": all(map(_sound, first["rows"].values())) and _same(first, again, "rows"),
        "files": sum(len(files or ()) for files in _files(first).values()),
    }


def _same(first: Seen, again: Seen, *parts: str) -> bool:
    return all(first[part] == again[part] for part in parts)


def _sound(part: Any) -> bool:
    return not (isinstance(part, dict) and "error" in part)


def _all_differ(seen: Seen, first: Seen) -> bool:
    """Whether the model's weights and every data set's rows are there and are others."""
    pairs = [(seen["weights"], first["weights"])] + [(seen["rows"][name], first["rows"][name]) for name in seen["rows"]]
    return all(_sound(now) and now != before for now, before in pairs)


# Faults ---------------------------------------------------------------------------------------------------------


def _noticed(seen: Seen, first: Seen) -> dict[str, bool]:
    """By damaged file: whether what was loaded of it is an error or as it was before."""
    return {
        WEIGHTS: not _sound(seen["weights"]) or seen["weights"] == first["weights"],
        PARQUET: not _sound(seen["rows"][TABLE]) or seen["rows"][TABLE]["rows"] == first["rows"][TABLE]["rows"],
        JSONL: not _sound(seen["rows"][LINES]) or seen["rows"][LINES]["rows"] == first["rows"][LINES]["rows"],
    }


def _wrong(client: Client, pins: Mapping[str, str], path: str) -> list[str]:
    """The files that the client's own verification finds in the repository of `path`; an error counts as one."""
    name, kind = DAMAGED[path]
    found = client.ask("verify", repository=name, kind=kind, revision=pins[name])
    return ["error"] if "error" in found else [*found["wrong"], *found["missing"]]


def _figures(fault: str, noticed: Mapping[str, bool], client: Client, pins: Mapping[str, str]) -> dict[str, Any]:
    by_file = {f"{fault}_noticed_{Path(path).suffix[1:]}": seen for path, seen in noticed.items()}
    verified = all(_wrong(client, pins, path) == [path] for path in noticed)
    return {f"{fault}_noticed": all(noticed.values()), f"{fault}_verified": verified, **by_file}


def _in_the_cache(client: Client, pin: Order, first: Seen, pins: Mapping[str, str]) -> dict[str, Any]:
    """A bit turned over in cached files. The prepared copies of the data sets go, as on a machine that lacks them."""
    sound = all(not _wrong(client, pins, path) for path in DAMAGED)
    for path, (name, kind) in DAMAGED.items():
        done = client.ask("damage", repository=name, kind=kind, revision=pins[name], path=path)
        if "error" in done:
            raise RuntimeError(f"no bit of {path} could be turned over: {done['error']}")
    client.ask("forget_prepared")
    return {"sound_verified": sound} | _figures("cache", _noticed(client.ask("load", **pin), first), client, pins)


def _on_the_way(hub: Hub, client: Client, pin: Order, first: Seen, pins: Mapping[str, str]) -> dict[str, Any]:
    """A bit turned over on the way, and half a file in place of the whole."""
    for path, (name, _) in DAMAGED.items():
        hub.corrupt(name, path)
    figures = _figures("wire", _noticed(client.ask("load", cold=True, **pin), first), client, pins)
    hub.mend()
    hub.shorten(MODEL, WEIGHTS)
    short = client.ask("load", cold=True, **pin)["weights"]
    hub.mend()
    return {**figures, "short_noticed": not _sound(short) or short == first["weights"]}


def _broken(hub: Hub, client: Client, settings: HubDownloads) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Files of several lengths, each of whose connection breaks once in the middle."""
    draw = random.Random(settings.seed)
    files = {f"{mib}.bin": draw.randbytes(mib * MIB) for mib in settings.large_mib}
    hub.commit("model", LARGE, files)
    for path in files:
        hub.truncate(LARGE, path)
    before = len(hub.requests)
    seen = client.ask("download", cold=True, repository=LARGE, paths=list(files))
    requests = hub.requests[before:]
    hub.mend()
    right = seen == {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    resumed = [_resumed_at(requests, path) for path in files]
    return {"broken_right": right}, {
        "broken_at_bytes": [len(data) // 2 for data in files.values()],
        "resumed_at_bytes": resumed,
    }


def _resumed_at(requests: Sequence[Request], path: str) -> float:
    """From where the last request for a file asked."""
    asked = [r.range for r in requests if r.method == "GET" and r.sent and r.path.endswith(f"/{path}")]
    last = asked[-1] if asked else None
    return float(last.removeprefix("bytes=").split("-")[0]) if last else 0.0


def _killed(hub: Hub, client: Client, seed: int) -> dict[str, Any]:
    """A download that is killed in the middle, and the same again in another process with the same cache."""
    data = random.Random(seed).randbytes(24 * MIB)
    hub.commit("model", LARGE, {"killed.bin": data})
    hub.truncate(LARGE, "killed.bin")
    killed = client.ask("download", cold=True, repository=LARGE, paths=["killed.bin"], ends=True)
    hub.mend()
    before = len(hub.requests)
    seen = client.ask("download", repository=LARGE, paths=["killed.bin"])
    right = "killed" in killed and seen == {"killed.bin": hashlib.sha256(data).hexdigest()}
    again = _sent(hub.requests[before:]) - (len(data) - len(data) // 2)
    return {"killed_right": right, "killed_bytes_again": again}


# Public ---------------------------------------------------------------------------------------------------------


def _public(settings: HubDownloads) -> Outcome:
    """The same on a hub that the lab does not run: the pin is an older commit, so `main` has moved already."""
    outcome = Outcome(tags={"endpoint": settings.endpoint, "model": settings.model, "data set": settings.data_set})
    with tempfile.TemporaryDirectory() as scratch, Client(public_environment(Path(scratch) / "home")) as client:
        model, data = (
            _older(client, name, kind) for name, kind in ((settings.model, "model"), (settings.data_set, "dataset"))
        )
        pin: Order = {"model": settings.model, "revision": model, "data_sets": {settings.data_set: data}}
        head: Order = {"model": settings.model, "revision": None, "data_sets": {settings.data_set: None}}
        first = client.ask("load", cold=True, **pin)
        committed = all(
            client.ask("verify", repository=name, kind=kind, revision=commit) == {"wrong": [], "missing": []}
            for name, kind, commit in ((settings.model, "model", model), (settings.data_set, "dataset", data))
        )
        again = client.ask("load", cold=True, **pin)
        changed = client.ask("load", **head)
        outcome.figures |= _cold(first, again, model, _files(first) if committed else {})
        outcome.figures |= {
            "pinned_cold_equal": again == first,
            "pinned_warm_equal": client.ask("load", **pin) == first,
            "unpinned_warm_changed": _files(changed) != _files(first),
            "unpinned_cold_changed": _files(client.ask("load", cold=True, **head)) != _files(first),
        }
    return outcome


def _older(client: Client, name: str, kind: str) -> str:
    """The newest commit that has the files of `main`, one of them with other contents."""
    found = client.ask("history", repository=name, kind=kind)
    if "error" in found:
        raise ConnectionError(
            f"the public hub does not give {kind} {name} ({found['error']}). Connect, or leave `public` out of the profile."
        )
    newest, *others = found["commits"]
    files = found["files"]
    older = [commit for commit in others if set(files[commit]) == set(files[newest]) and files[commit] != files[newest]]
    if not older:
        raise ValueError(f"{kind} {name} has no older commit with the same files. Name another under `public`.")
    return older[0]

"""The clients of a hub in a process of their own: huggingface_hub, transformers and datasets, as they are installed.

    with Client(hub.environment()) as client:
        seen = client.ask("load", model="lab/tiny", revision=pin, data_sets={"lab/notes": notes_pin})

They read where the hub and their cache are when they are imported. The process imports them once (that takes seconds) and
follows each order in a fork of itself that has asked nothing yet; a cold order begins with an empty cache.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

CHUNK_BYTES = 10 * 2**20
"""What huggingface_hub writes at a time: what is less when a connection breaks is lost."""

RECENT = 20
"""How many commits back a history goes."""

PRELOAD = (
    "transformers.models.auto",
    "transformers.models.llama.modeling_llama",
    "datasets.packaged_modules.json.json",
)
"""What the libraries import when it is used: once for all orders."""


class Client:
    """The process, up from `with` to the end of the block."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = dict(environment)

    def __enter__(self) -> Self:
        root = Path(__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from lab.hub_client import follow_orders; follow_orders()"],
            env=os.environ | self.environment | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, action: str, cold: bool = False, **arguments: Any) -> dict[str, Any]:
        """What became of an order: the answer of the function of this name below, `{"error": ...}` or `{"killed": 1}`.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdin
        assert self.process.stdout
        line = json.dumps({"action": action, "cold": cold, "arguments": arguments})
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"the client of the hub ended with exit code {self.process.wait()} at '{action}'")
        return json.loads(answer)


def public_environment(folder: Path) -> dict[str, str]:
    """Variables for the hub that the clients ask by themselves: no account, and a cache in `folder`."""
    off = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    places = {"HF_HOME": f"{folder}", "HF_HUB_CACHE": f"{folder}/hub", "HF_DATASETS_CACHE": f"{folder}/datasets"}
    return places | dict.fromkeys(off, "0") | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}


# In the process -------------------------------------------------------------------------------------------------


def follow_orders() -> None:
    """Read orders from standard input and answer them on standard output, a line each, to the end of the input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    import datasets
    import torch

    for module in PRELOAD:
        importlib.import_module(module)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    gc.freeze()  # else each collection in a fork copies the pages of all that was imported
    home = Path(os.environ["HF_HOME"])
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        order = json.loads(line)
        if order["cold"]:
            shutil.rmtree(home, ignore_errors=True)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_follow, args=(order, sender))
        process.start()
        sender.close()
        try:
            answer = receiver.recv()
        except EOFError:
            answer = {"killed": 1}
        process.join()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _follow(order: dict[str, Any], sender: Any) -> None:
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        action.__name__: action for action in (load, download, verify, damage, forget_prepared, history)
    }
    sender.send(_attempt(lambda: actions[order["action"]](**order["arguments"])))


def _attempt(call: Callable[[], Any]) -> Any:
    """What `call` returns, or `{"error": its first line}`."""
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def load(model: str, revision: str | None, data_sets: dict[str, str | None]) -> dict[str, Any]:
    """A model, its tokenizer and data sets, as users load them: what came of each, as hashes.

    Args:
        revision: of the model; None is what the library takes by itself.
        data_sets: the revision of each.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi, snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def files(name: str, kind: str, pin: str | None) -> dict[str, Any]:
        folder = Path(snapshot_download(name, repo_type=kind, revision=pin))
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        return {"commit": folder.name, "files": {name: _sha256(path.read_bytes()) for name, path in found.items()}}

    def weights() -> str:
        state = AutoModelForCausalLM.from_pretrained(model, revision=revision).state_dict()
        return _sha256(b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state)))

    def rows(name: str, pin: str | None) -> dict[str, str]:
        found = load_dataset(name, split="train", revision=pin)
        return {"rows": _sha256(json.dumps(found.to_list()).encode()), "fingerprint": found._fingerprint}

    return {
        "commit": _attempt(lambda: HfApi().model_info(model, revision=revision).sha),
        "model": _attempt(partial(files, model, "model", revision)),
        "weights": _attempt(weights),
        "tokens": _attempt(lambda: AutoTokenizer.from_pretrained(model, revision=revision)("a b c d").input_ids),
        "data": {name: _attempt(partial(files, name, "dataset", pin)) for name, pin in data_sets.items()},
        "rows": {name: _attempt(partial(rows, name, pin)) for name, pin in data_sets.items()},
    }


def download(repository: str, paths: list[str], ends: bool = False) -> dict[str, Any]:
    """The hash of each file; with `ends`, the process is killed once part of one has been written."""
    from huggingface_hub import constants, snapshot_download

    if ends:
        threading.Thread(target=_end_in_the_middle, args=(Path(constants.HF_HUB_CACHE),), daemon=True).start()
    folder = Path(snapshot_download(repository, allow_patterns=paths))
    return {path: _sha256((folder / path).read_bytes()) for path in paths}


def _end_in_the_middle(cache: Path) -> None:
    """End this process, with no chance to tidy up, when a chunk of a file that is not whole has arrived."""
    while not any(path.stat().st_size >= CHUNK_BYTES for path in cache.rglob("*.incomplete")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def verify(repository: str, kind: str, revision: str) -> dict[str, Any]:
    """Which cached files of the revision differ from what the hub says of them (`hf cache verify`)."""
    from huggingface_hub import HfApi

    found = HfApi().verify_repo_checksums(repository, repo_type=kind, revision=revision)
    return {"wrong": [file["path"] for file in found.mismatches], "missing": list(found.missing_paths)}


def damage(repository: str, kind: str, revision: str, path: str) -> dict[str, Any]:
    """Turn over one bit in the middle of a cached file."""
    from huggingface_hub import hf_hub_download

    file = Path(hf_hub_download(repository, path, repo_type=kind, revision=revision)).resolve()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return {}


def forget_prepared() -> dict[str, Any]:
    """Remove what datasets has prepared from the files that it downloaded."""
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
    return {}


def history(repository: str, kind: str) -> dict[str, Any]:
    """The commits of `main`, the newest first, each with the files that it holds and their hashes."""
    from huggingface_hub import HfApi

    api = HfApi()
    commits = [commit.commit_id for commit in api.list_repo_commits(repository, repo_type=kind)]
    listed: dict[str, dict[str, str]] = {}
    for commit in commits[:RECENT]:
        entries = api.list_repo_tree(repository, repo_type=kind, revision=commit, recursive=True)
        listed[commit] = {entry.path: entry.blob_id for entry in entries if hasattr(entry, "blob_id")}
    return {"commits": commits[:RECENT], "files": listed}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

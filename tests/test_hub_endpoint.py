"""The loopback hub is taken for the real one by huggingface_hub, transformers and datasets.

Each client is a process of its own, prints what it saw as one line of JSON, and costs seconds to import: the slow one
(transformers and datasets) runs once for the module, and the tests read its answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.hub_endpoint import TOKEN, Hub, Request

MODEL, DATASET, GATED = "lab/tiny-llama", "lab/capitals", "lab/gated"
UNKNOWN = "0123456789" * 4
VOCABULARY = ["<unk>", "the", "capital", "of", "France", "is", "Paris"]


def run_client(script: str, environment: dict[str, str], *arguments: str) -> Any:
    """What `script` passes to `answer`; its arguments are in `arguments`, and `attempt` returns errors as text."""
    prelude = """
        import json, sys
        from pathlib import Path
        arguments = sys.argv[1:]
        def answer(seen):
            print(json.dumps(seen))
        def attempt(call, *positional, **named):
            try:
                return str(call(*positional, **named))
            except Exception as error:
                return f"{type(error).__name__}: {error}"
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def tiny_llama(seed: int) -> dict[str, bytes]:
    """The files of a random one-layer Llama, 16 wide, with a tokenizer of whole words."""
    import numpy
    from safetensors.numpy import save
    from tokenizers import Tokenizer, models, pre_tokenizers

    width, inner, words = 16, 32, len(VOCABULARY)
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, width),
        **{f"{layer}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"},
        **{f"{layer}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")},
        f"{layer}.mlp.down_proj.weight": (width, inner),
        f"{layer}.input_layernorm.weight": (width,),
        f"{layer}.post_attention_layernorm.weight": (width,),
        "model.norm.weight": (width,),
        "lm_head.weight": (words, width),
    }
    draw = numpy.random.default_rng(seed)
    weights = {name: draw.normal(size=shape).astype(numpy.float32) for name, shape in shapes.items()}
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}
    config |= {"hidden_size": width, "intermediate_size": inner, "vocab_size": words, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(about).encode(),
    }


def embedding_hash(files: dict[str, bytes]) -> str:
    from safetensors.numpy import load

    return hashlib.sha256(load(files["model.safetensors"])["model.embed_tokens.weight"].tobytes()).hexdigest()


def jsonl(*rows: dict[str, str]) -> dict[str, bytes]:
    return {"data/train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}


OLD_ROWS = [{"place": "France", "capital": "Paris"}, {"place": "Japan", "capital": "Tokyo"}]
NEW_ROWS = [{"place": "France", "capital": "Lyon"}]

LIBRARIES = """
    import hashlib
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_name, pin, dataset_name, dataset_pin, gated, unknown = arguments

    def embedding_hash(model):
        return hashlib.sha256(model.get_input_embeddings().weight.detach().numpy().tobytes()).hexdigest()

    def rows(**revision):
        return load_dataset(dataset_name, split="train", **revision).to_list()

    pinned = AutoModelForCausalLM.from_pretrained(model_name, revision=pin)
    tokenizer = AutoTokenizer.from_pretrained(model_name, revision=pin)
    tokens = tokenizer("the capital of France is Paris", return_tensors="pt")
    load_model = AutoModelForCausalLM.from_pretrained
    answer({
        "commit": HfApi().model_info(model_name, revision=pin).sha,
        "pinned": embedding_hash(pinned),
        "main": embedding_hash(load_model(model_name)),
        "tokens": tokens.input_ids[0].tolist(),
        "shape": list(pinned(**tokens).logits.shape),
        "pinned rows": rows(revision=dataset_pin),
        "main rows": rows(),
        "unknown model": attempt(load_model, "lab/nothing"),
        "unknown model revision": attempt(load_model, model_name, revision=unknown),
        "gated model": attempt(load_model, gated),
        "unknown dataset": attempt(load_dataset, "lab/nothing"),
        "unknown dataset revision": attempt(load_dataset, dataset_name, revision=unknown),
        "gated dataset": attempt(load_dataset, gated),
    })
"""


@dataclass
class Session:
    """What the slow client and the hub saw of each other."""

    pin: str
    seen: dict[str, Any]
    requests: list[Request]


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Hub() as server:
        pins = server.commit("model", MODEL, tiny_llama(0)), server.commit("dataset", DATASET, jsonl(*OLD_ROWS))
        server.commit("model", MODEL, tiny_llama(1))
        server.commit("dataset", DATASET, jsonl(*NEW_ROWS))
        server.commit("model", GATED, tiny_llama(0))
        server.commit("dataset", GATED, jsonl(*OLD_ROWS))
        server.gate(GATED)
        names = MODEL, pins[0], DATASET, pins[1], GATED, UNKNOWN
        yield Session(pins[0], run_client(LIBRARIES, server.environment(), *names), server.requests)


def test_a_model_and_its_tokenizer_load_by_name_and_revision(session: Session) -> None:
    assert session.seen["commit"] == session.pin
    assert session.seen["tokens"] == [1, 2, 3, 4, 5, 6]
    assert session.seen["shape"] == [1, 6, len(VOCABULARY)]


def test_after_main_moves_the_pin_still_gives_the_old_weights_and_rows(session: Session) -> None:
    assert session.seen["pinned"] == embedding_hash(tiny_llama(0))
    assert session.seen["main"] == embedding_hash(tiny_llama(1))
    assert session.seen["pinned rows"] == OLD_ROWS
    assert session.seen["main rows"] == NEW_ROWS


def test_an_unknown_repository_revision_or_a_gated_one_gives_the_libraries_own_errors(session: Session) -> None:
    seen = session.seen
    assert seen["unknown model"].startswith("OSError: lab/nothing is not a local folder and is not a valid model")
    assert seen["unknown model revision"].startswith(f"OSError: {UNKNOWN} is not a valid git identifier")
    assert seen["gated model"].startswith("OSError: You are trying to access a gated repo.")
    assert seen["unknown dataset"].startswith("DatasetNotFoundError: Dataset 'lab/nothing' doesn't exist")
    assert seen["unknown dataset revision"].startswith(f"DatasetNotFoundError: Revision '{UNKNOWN}' doesn't exist")
    assert seen["gated dataset"].startswith(f"DatasetNotFoundError: Dataset '{GATED}' is a gated dataset")


def test_weights_come_from_the_second_host_and_small_files_from_the_hub(session: Session) -> None:
    bodies = [r for r in session.requests if r.method == "GET" and "/resolve/" in r.path and r.status == 200]
    assert {r.path.rpartition(".")[2] for r in bodies if r.host == "cdn"} == {"safetensors"}
    assert {r.path.rpartition(".")[2] for r in bodies if r.host == "hub"} == {"json", "jsonl"}


def test_no_route_that_the_libraries_ask_for_is_missing(session: Session) -> None:
    """But for the list of programs that drive the client, asked for where one of them does and never needed."""
    assert {r.path for r in session.requests if r.status == 501} <= {"/api/agent-harnesses"}


FILES = {"README.md": b"# Facts\n", "data/a/x.txt": b"x", "data/y.txt": b"yy", "weights.bin": bytes(range(256))}

READER = """
    from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
    name, pin, token = arguments
    api = HfApi(token=token or False)

    def read(path, **named):
        return Path(hf_hub_download(name, path, token=token or False, **named)).read_text()

    def kinds(entries):
        return sorted((entry.path, type(entry).__name__) for entry in entries)

    about = api.model_info(name, files_metadata=True)
    files = HfFileSystem(token=token or False)
    answer({
        "main": about.sha,
        "pin": api.model_info(name, revision=pin).sha,
        "gated": about.gated,
        "large": {file.rfilename: file.lfs.sha256 for file in about.siblings if file.lfs},
        "README": attempt(read, "README.md"),
        "pinned README": attempt(read, "README.md", revision=pin),
        "absent": attempt(read, "absent.txt"),
        "elsewhere": attempt(read, "README.md", repo_type="dataset"),
        "tree": kinds(api.list_repo_tree(name, "data")),
        "whole tree": kinds(api.list_repo_tree(name, recursive=True)),
        "absent tree": attempt(lambda: list(api.list_repo_tree(name, "nowhere"))),
        "paths": kinds(api.get_paths_info(name, ["data", "data/y.txt", "absent.txt"])),
        "part": attempt(lambda: files.open(f"{name}/weights.bin", block_size=16).read(3).hex()),
        "snapshot": attempt(lambda: len(list(Path(snapshot_download(name, token=token or False)).rglob("*.*")))),
    })
"""


def test_the_hub_client_lists_and_reads_and_follows_main(hub: Hub, tmp_path: Path) -> None:
    for path, data in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    pin, cache = hub.commit("model", MODEL, tmp_path), hub.environment()
    first = run_client(READER, cache, MODEL, pin, "")
    assert first["main"] == first["pin"] == pin
    assert first["README"] == first["pinned README"] == "# Facts\n"
    assert first["large"] == {"weights.bin": hashlib.sha256(FILES["weights.bin"]).hexdigest()}
    assert first["absent"].startswith("RemoteEntryNotFoundError")
    assert first["elsewhere"].startswith("RepositoryNotFoundError")
    assert first["tree"] == [["data/a", "RepoFolder"], ["data/y.txt", "RepoFile"]]
    assert [path for path, kind in first["whole tree"] if kind == "RepoFile"] == sorted(FILES)
    assert first["absent tree"].startswith("RemoteEntryNotFoundError")
    assert first["paths"] == [["data", "RepoFolder"], ["data/y.txt", "RepoFile"]]
    assert first["part"] == "000102"
    assert any(r.range and r.status == 206 for r in hub.requests)
    assert first["snapshot"] == str(len(FILES))

    moved = hub.commit("model", MODEL, {**FILES, "README.md": b"# Other facts\n"})
    second = run_client(READER, cache, MODEL, pin, "")
    assert (second["main"], second["README"]) == (moved, "# Other facts\n")
    assert (second["pin"], second["pinned README"]) == (pin, "# Facts\n")


def test_a_gated_repository_is_listed_but_read_only_with_the_token(hub: Hub) -> None:
    pin = hub.commit("model", GATED, FILES)
    hub.gate(GATED)
    stranger = run_client(READER, hub.environment(), GATED, pin, "")
    assert (stranger["main"], stranger["gated"]) == (pin, "manual")
    assert stranger["README"].startswith("GatedRepoError: 401")
    other = run_client(READER, hub.environment(), GATED, pin, "hf_other")
    assert other["README"].startswith("GatedRepoError: 403")
    member = run_client(READER, hub.environment(), GATED, pin, TOKEN)
    assert (member["README"], member["snapshot"]) == ("# Facts\n", str(len(FILES)))
    assert not any(r.authorised for r in hub.requests if r.host == "cdn")


def test_a_commit_follows_from_its_contents_and_its_parent() -> None:
    one, other = Hub(), Hub()
    first, second = one.commit("model", MODEL, FILES), one.commit("model", MODEL, FILES)
    assert first == other.commit("model", MODEL, dict(reversed(FILES.items())))
    assert len({first, second, other.commit("model", MODEL, {**FILES, "data/y.txt": b"zz"})}) == 3
    assert len(first) == 40
    assert int(first, 16) >= 0


# The client writes 10 MiB at a time and forgets what came after the last whole 10 MiB when the connection breaks.
LARGE = random.Random(0).randbytes(24 * 2**20)

DOWNLOADS = """
    import hashlib
    from huggingface_hub import constants, hf_hub_download

    def sha256(path):
        return hashlib.sha256(Path(hf_hub_download(arguments[0], path)).read_bytes()).hexdigest()

    answer({path: attempt(sha256, path) for path in arguments[1:]} | {
        "kept": [p.name for p in Path(constants.HF_HUB_CACHE).rglob("blobs/*")],
    })
"""


def test_a_broken_download_is_resumed_or_raises_and_never_leaves_a_damaged_file(hub: Hub) -> None:
    files = {"once.bin": LARGE, "small.json": b"[" + b"1," * 500 + b"1]", "always.bin": LARGE[::-1]}
    whole = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    hub.commit("model", MODEL, files)
    hub.truncate(MODEL, "once.bin")
    hub.truncate(MODEL, "small.json")
    hub.truncate(MODEL, "always.bin", times=1000)
    cache = hub.environment()
    seen = run_client(DOWNLOADS, cache, MODEL, *files)
    assert seen["once.bin"] == whole["once.bin"]
    assert seen["small.json"] == whole["small.json"]
    assert seen["always.bin"].startswith("RemoteProtocolError")
    assert len(seen["kept"]) == 2
    resumed = [r for r in hub.requests if "once.bin" in r.path and r.range]
    assert [(r.status, r.range) for r in resumed] == [(206, f"bytes={10 * 2**20}-")]

    hub.truncate(MODEL, "always.bin", times=0)
    assert run_client(DOWNLOADS, cache, MODEL, "always.bin")["always.bin"] == whole["always.bin"]


def test_a_corrupt_file_has_the_true_length_and_the_client_takes_it(hub: Hub) -> None:
    """The client trusts lengths alone: whoever needs the very bytes must compare hashes."""
    hub.commit("model", MODEL, FILES)
    hub.corrupt(MODEL, "weights.bin")
    wrong = FILES["weights.bin"][:128] + bytes([128 ^ 1]) + FILES["weights.bin"][129:]
    seen = run_client(DOWNLOADS, hub.environment(), MODEL, "weights.bin")
    assert seen["weights.bin"] == hashlib.sha256(wrong).hexdigest()
    assert seen["kept"] == [hashlib.sha256(FILES["weights.bin"]).hexdigest()]


def get(url: str) -> tuple[bytes, str]:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as answer:
        return answer.read(), answer.headers["X-Repo-Commit"] or ""


def test_commits_are_listed_newest_first_and_up_to_the_revision(hub: Hub) -> None:
    old, new = (hub.commit("model", MODEL, {"README.md": text}) for text in (b"old", b"new"))

    def listed(revision: str) -> list[str]:
        return [commit["id"] for commit in json.loads(get(f"{hub.url}/api/models/{MODEL}/commits/{revision}")[0])]

    assert listed("main") == [new, old]
    assert listed(old) == [old]


def test_a_hub_that_ignores_revisions_serves_main_and_says_so(hub: Hub) -> None:
    old, new = (hub.commit("model", MODEL, {"README.md": text}) for text in (b"old", b"new"))
    assert get(f"{hub.url}/{MODEL}/resolve/{old}/README.md") == (b"old", old)
    hub.ignore_revisions()
    assert get(f"{hub.url}/{MODEL}/resolve/{old}/README.md") == (b"new", new)


def test_a_shortened_file_is_half_of_it_until_the_hub_is_mended(hub: Hub) -> None:
    pin = hub.commit("model", MODEL, {"README.md": b"0123456789"})
    hub.shorten(MODEL, "README.md")
    assert get(f"{hub.url}/{MODEL}/resolve/{pin}/README.md")[0] == b"01234"
    assert hub.requests[-1].sent == 5
    hub.mend()
    assert get(f"{hub.url}/{MODEL}/resolve/{pin}/README.md")[0] == b"0123456789"

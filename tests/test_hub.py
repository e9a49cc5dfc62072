"""The trial that downloads from a hub: real clients, a loopback hub, and a figure for each fact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab import hub
from lab.hub_client import Client
from lab.hub_endpoint import Hub
from lab.runners import Outcome
from lab.specs import HubDownloads
from lab.workspace import Workspace

NOWHERE = Workspace(Path("nowhere"), "smoke")


@pytest.fixture(scope="module")
def sound() -> Outcome:
    """A trial in which the hub is sound but for the faults that the trial orders."""
    return hub.download(HubDownloads(large_mib=(4, 24), seed=1), NOWHERE)


def test_two_cold_loads_of_a_pin_are_the_same_before_and_after_main_moves(sound: Outcome) -> None:
    facts = ["bytes_equal", "bytes_committed", "commit_equal", "weights_equal", "fingerprint_equal"]
    assert all(sound.figures[f"cold_{fact}"] for fact in facts)
    assert sound.figures["pinned_cold_equal"]
    assert sound.figures["pinned_warm_equal"]
    assert sound.figures["unpinned_cold_changed"]
    assert sound.figures["unpinned_warm_changed"]
    assert sound.figures["files"] >= 7


def test_a_warm_cache_asks_and_downloads_nothing(sound: Outcome) -> None:
    assert sound.figures["warm_bytes"] == 0
    assert sound.figures["cold_bytes"] > 50_000
    assert 0 < sound.figures["warm_requests"] < sound.figures["cold_requests"]


def test_a_broken_connection_is_resumed_at_the_last_whole_chunk_and_a_killed_download_from_the_start(
    sound: Outcome,
) -> None:
    assert sound.figures["broken_right"]
    assert sound.series["broken_at_bytes"] == [2 * 2**20, 12 * 2**20]
    assert sound.series["resumed_at_bytes"] == [0, 10 * 2**20]
    assert sound.figures["killed_right"]
    assert sound.figures["killed_bytes_again"] == 12 * 2**20


def test_lengths_are_checked_and_bits_are_not_but_the_verification_finds_them(sound: Outcome) -> None:
    assert sound.figures["short_noticed"]
    for fault in ("wire", "cache"):
        assert not sound.figures[f"{fault}_noticed_safetensors"]
        assert not sound.figures[f"{fault}_noticed_jsonl"]
        assert not sound.figures[f"{fault}_noticed"]
        assert sound.figures[f"{fault}_verified"]
    assert sound.figures["sound_verified"]


def test_a_hub_that_ignores_revisions_is_told_apart() -> None:
    found = hub.download(HubDownloads(fault="ignores-revisions"), NOWHERE).figures
    assert found["cold_bytes_equal"]
    assert not found["pinned_cold_equal"]
    assert not found["pinned_warm_equal"]
    assert found["unpinned_cold_changed"]


def test_the_public_hub_is_asked_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as server:
        old = hub._commit(server, seed=0, version=0)
        hub._commit(server, seed=0, version=1)
        monkeypatch.setattr(hub, "public_environment", lambda folder: server.environment())
        found = hub.download(HubDownloads(endpoint="public", model=hub.MODEL, data_set=hub.TABLE), NOWHERE).figures
        assert any(f"/resolve/{old[hub.MODEL]}/" in request.path for request in server.requests)
    assert found.pop("files") >= 6
    assert all(found.values())
    assert set(found) >= {"cold_bytes_committed", "pinned_cold_equal", "unpinned_warm_changed"}


class Answers(Client):
    """A client that was given its answer."""

    def __init__(self, answer: dict[str, Any]):
        self.answer = answer

    def ask(self, action: str, cold: bool = False, **arguments: Any) -> dict[str, Any]:
        return self.answer


def test_a_hub_that_cannot_be_reached_is_one_line_that_says_so() -> None:
    with pytest.raises(ConnectionError) as caught:
        hub._older(Answers({"error": "ConnectError: no route"}), "a/b", "model")
    assert str(caught.value) == (
        "the public hub does not give model a/b (ConnectError: no route). Connect, or leave `public` out of the profile."
    )


def test_the_pin_is_the_newest_older_commit_with_the_same_files() -> None:
    files = {"new": {"a": "1", "b": "1"}, "same": {"a": "1", "b": "1"}, "less": {"a": "1"}, "old": {"a": "0", "b": "1"}}
    answers = Answers({"commits": list(files), "files": files})
    assert hub._older(answers, "a/b", "model") == "old"
    files.pop("old")
    answers = Answers({"commits": list(files), "files": files})
    with pytest.raises(ValueError, match=r"model a/b has no older commit with the same files\. Name another under"):
        hub._older(answers, "a/b", "model")


def test_a_client_that_has_ended_says_at_which_order() -> None:
    with Hub() as server, Client(server.environment() | {"PYTHONHOME": "/nowhere"}) as client:
        client.process.wait()
        with pytest.raises(RuntimeError, match="the client of the hub ended with exit code 1 at 'load'"):
            client.ask("load")

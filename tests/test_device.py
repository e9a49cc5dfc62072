"""The card at hand, made up: what nvidia-smi prints is read, and a card that others use is refused."""

from __future__ import annotations

import os

import pytest

from lab import device
from lab.cards import GIB
from lab.device import Card, Holder, ancestors, limit_gib, read_smi, require_free, size_bytes
from lab.errors import LabError
from lab.study import Study
from tests.conftest import ROOT

MIB = 2**20
H100 = "NVIDIA H100 80GB HBM3, 2235, 78845\n"
"""Used and free; what the driver keeps is in neither."""
USERS = "4242, /usr/bin/python3.12, 2100\n77, /opt/a, b/serve, 131\n"


def test_what_nvidia_smi_prints_is_read() -> None:
    card = read_smi(H100, USERS)
    assert card == Card(
        name="NVIDIA H100 80GB HBM3",
        total_bytes=81080 * MIB,
        free_bytes=78845 * MIB,
        holders=(Holder(4242, "python3.12", 2100 * MIB), Holder(77, "serve", 131 * MIB)),
    )


@pytest.mark.parametrize("holders", ["", "\n", "No running processes found\n", "5, [Not Found], [N/A]\n"])
def test_a_card_without_known_processes_has_none(holders: str) -> None:
    assert read_smi(H100, holders).holders == ()


@pytest.mark.parametrize("card", ["", "NVIDIA GB10, [N/A], [N/A]\n", "No devices were found\n"])
def test_an_answer_without_the_card_s_memory_is_no_answer(card: str) -> None:
    with pytest.raises(ValueError):
        read_smi(card, "")


def test_a_card_that_others_use_is_refused_with_who_and_how_much_and_what_to_do() -> None:
    with pytest.raises(LabError) as caught:
        require_free(read_smi(H100, USERS), own=())
    assert str(caught.value) == (
        "NVIDIA H100 80GB HBM3: 2,344 MB are held by others, at most 500 MB may be: python3.12 (process 4242) 2,202 MB, "
        "serve (process 77) 137 MB. End them, or choose another card (CUDA_VISIBLE_DEVICES=1), then start again."
    )


def test_memory_of_which_nobody_is_named_counts_too() -> None:
    with pytest.raises(LabError, match=r"2,344 MB by whom the driver does not say \(another user's, or a display\)"):
        require_free(read_smi(H100, ""), own=())


def test_what_the_study_itself_and_its_parents_hold_does_not_count() -> None:
    held = f"{os.getpid()}, python, 900\n{os.getppid()}, python, 1200\n"
    assert {os.getpid(), os.getppid()} <= ancestors(os.getpid())
    require_free(read_smi(H100, held))
    with pytest.raises(LabError, match=r"python \(process 4242\) 944 MB"):
        require_free(read_smi("A card, 2235, 78845", f"{os.getpid()}, python, 1335\n4242, python, 900\n"))


@pytest.mark.parametrize(("megabytes", "refused"), [(500, False), (501, True)])
def test_five_hundred_megabytes_are_borne(megabytes: int, refused: bool) -> None:
    card = Card("a card", 10**10, 10**10 - megabytes * 10**6)
    if refused:
        with pytest.raises(LabError, match="501 MB are held by others"):
            require_free(card, own=())
    else:
        require_free(card, own=())


def test_a_study_does_not_start_on_a_card_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(device, "card_here", lambda: read_smi(H100, USERS))
    with pytest.raises(LabError, match=r"2,344 MB are held by others.*python3\.12 \(process 4242\)"):
        Study.load("gpu", ROOT).require_device()
    monkeypatch.setattr(device, "card_here", lambda: read_smi("NVIDIA H100 80GB HBM3, 3, 81077", ""))
    card = Study.load("gpu", ROOT).require_device()
    assert card is not None
    assert card.free_bytes == 81077 * MIB
    assert Study.load("cpu", ROOT).require_device() is None


# A smaller card -------------------------------------------------------------------------------------------------


def test_a_card_can_stand_for_a_smaller_one_and_not_for_a_larger() -> None:
    card = Card("a card", 79 * GIB, 78 * GIB)
    small = card.limited(24)
    assert (small.name, small.total_bytes, small.free_bytes) == (
        "a card as a card of 24 GB",
        size_bytes(24),
        size_bytes(24),
    )
    assert 23 * GIB < size_bytes(24) < 24 * GIB
    assert card.limited(None) == card.limited(96) == card
    assert Card("a", 79 * GIB, 10 * GIB).limited(24).free_bytes == 10 * GIB


@pytest.mark.parametrize(("text", "gib"), [("", None), ("24", 24.0), ("7.5", 7.5)])
def test_the_size_of_an_emulated_card_is_read(text: str, gib: float | None) -> None:
    assert limit_gib({"LAB_VRAM_GIB": text} if text else {}) == gib


@pytest.mark.parametrize("text", ["24GB", "0", "-8", "nan", "inf"])
def test_a_size_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(
        LabError, match=rf"LAB_VRAM_GIB is '{text}'; it must be a number of GB, at least 1\. Correct it"
    ):
        limit_gib({"LAB_VRAM_GIB": text})

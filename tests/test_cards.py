"""Cards: found by their names, what they hold, what they can do at most."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.cards import CONTEXT_BYTES, GIB, GPUS, card_bytes, find_gpu, peak_flops, shown_bytes, usable_bytes
from lab.pricing import read_spec
from tests.prices import SMALL, mistake


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("H100-80GB", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("RTX-3090", 71),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
    ],
)
def test_the_peak_of_a_card_is_found_by_its_name(name: str, teraflops: float) -> None:
    assert peak_flops(name) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Tesla V100-PCIE-16GB",
        "AMD EPYC 7B13",
    ],
)
def test_a_card_that_is_like_one_of_the_table_is_not_taken_for_it(name: str) -> None:
    assert peak_flops(name) is None


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("A100-80GB", "A100-80GB"),
        ("a100-80gb", "A100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("H200", "H200-141GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("4090", "RTX-4090"),
        ("RTX 4060 Ti", "RTX-4060-Ti-16GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("RTX A6000", "A6000"),
    ],
)
def test_a_card_is_found_by_any_of_its_names(asked: str, name: str) -> None:
    assert find_gpu(asked).name == name


@pytest.mark.parametrize("name", GPUS)
def test_every_card_is_found_by_its_own_name(name: str) -> None:
    assert find_gpu(name).name == name


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("RTX9090", "unknown gpu 'RTX9090'. Did you mean 'RTX-5090'? Known: V100-16GB, "),
        ("A100", "gpu: 'A100' may be A100-40GB or A100-80GB. Name one of them."),
        ("V100", "gpu: 'V100' may be V100-16GB or V100-32GB. Name one of them."),
        ("", "unknown gpu ''. Known: "),
    ],
)
def test_an_unknown_card_is_one_line_with_the_nearest(asked: str, said: str) -> None:
    assert mistake(lambda: find_gpu(asked)).startswith(said)


def test_no_card_has_more_memory_than_it_is_sold_with() -> None:
    sold = {"T4": 16, "RTX-3060": 12, "RTX-3090": 24, "RTX-4090": 24, "RTX-5090": 32, "L4": 24, "A6000": 48}
    sold |= {name: int(name.split("-")[-1][:-2]) for name in GPUS if name.endswith("GB")}
    for name, gib in sold.items():
        assert 0.9 * gib < GPUS[name].total_bytes / GIB < gib


def test_of_a_card_and_a_size_the_smaller_counts_and_a_size_alone_loses_the_drivers_share() -> None:
    config = {"config": SMALL}
    assert card_bytes(read_spec(config)) is None
    assert card_bytes(read_spec({**config, "vram_gib": 24})) == int(24 * GIB * 0.98)
    assert card_bytes(read_spec({**config, "gpu": "a100-80gb"})) == GPUS["A100-80GB"].total_bytes
    assert card_bytes(read_spec({**config, "gpu": "a100-80gb", "vram_gib": 80})) == GPUS["A100-80GB"].total_bytes
    assert card_bytes(read_spec({**config, "gpu": "a100-80gb", "vram_gib": 20})) == 20 * GIB


@given(total=st.integers(CONTEXT_BYTES, 2**40), quick=st.booleans())
def test_the_highest_peak_that_fits_shows_no_more_than_the_card_has(total: int, quick: bool) -> None:
    peak = usable_bytes(total, quick)
    assert shown_bytes(peak, quick) <= total + 1
    assert shown_bytes(peak + 2, quick) > total

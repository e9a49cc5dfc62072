"""AdamW with fp32 master weights: as good as float64 where pure bf16 stalls, and 12 bytes per parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lab.errors import LabError
from lab.optimizers import MasterWeightAdamW, check_optimizer

UPDATES = 200
# A bf16 number near 1 has its neighbour 2^-8 = 4e-3 away: a step of a tenth of that is rounded away.
RATE = 4e-4


def start(dtype: torch.dtype) -> torch.nn.Parameter:
    """4,096 weights between 1 and 2, all of which bf16 can hold."""
    generator = torch.Generator().manual_seed(0)
    values = 1 + torch.rand(4096, generator=generator)
    return torch.nn.Parameter(values.bfloat16().to(dtype))


def gradients() -> list[torch.Tensor]:
    """The same for every optimizer, of one sign and all of which bf16 can hold: it walks steadily one way."""
    generator = torch.Generator().manual_seed(1)
    return [(0.5 + torch.rand(4096, generator=generator)).bfloat16() for _ in range(UPDATES)]


def walk(dtype: torch.dtype, build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> torch.Tensor:
    """Where the weights are after UPDATES updates, in float64."""
    weight = start(dtype)
    optimizer = build([weight])
    for gradient in gradients():
        weight.grad = gradient.to(dtype)
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach().double()


def adamw(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=RATE, weight_decay=0.01)


def master(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return MasterWeightAdamW(weights, lr=RATE, weight_decay=0.01)


def test_small_updates_arrive_with_master_weights_and_are_rounded_away_in_pure_bf16() -> None:
    reference = walk(torch.float64, adamw)
    way = (reference - start(torch.float64).detach()).norm()
    pure = (walk(torch.bfloat16, adamw) - reference).norm() / way
    kept = (walk(torch.bfloat16, master) - reference).norm() / way
    # The rounding of the result itself: half a spacing of bf16 at most, a few per cent of the way gone.
    rounding = (reference.bfloat16().double() - reference).norm() / way
    assert pure > 0.9, "pure bf16 should have stalled"
    assert kept < 1.1 * rounding
    assert kept < pure / 10


def test_the_copies_follow_float64_to_the_rounding_of_fp32() -> None:
    weight = start(torch.bfloat16)
    optimizer = MasterWeightAdamW([weight], lr=RATE, weight_decay=0.01)
    for gradient in gradients():
        weight.grad = gradient
        optimizer.step()
    (copy,) = optimizer.master_weights
    # 200 updates, each rounded to 2^-24 of a number below 2.
    bound = UPDATES * 2 * 2**-24
    assert float((copy.detach().double() - walk(torch.float64, adamw)).abs().max()) < bound
    assert torch.equal(weight.detach(), copy.detach().bfloat16())


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8)]
    return torch.nn.Sequential(*layers).bfloat16()


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(4, 64, dtype=torch.bfloat16)).float().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def held(optimizer: MasterWeightAdamW) -> int:
    """Bytes of copies and moments; step counters are scalars and left out."""
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    return sum(t.numel() * t.element_size() for t in [*optimizer.master_weights, *moments])


def test_the_optimizer_holds_twelve_bytes_per_parameter() -> None:
    model = small_model()
    optimizer = MasterWeightAdamW(model.parameters(), lr=1e-3)
    count = sum(p.numel() for p in model.parameters())
    assert held(optimizer) == 4 * count
    update(model, optimizer)
    assert held(optimizer) == (4 + 8) * count
    update(model, optimizer)
    assert held(optimizer) == 12 * count


def test_gradients_are_released_and_the_weights_stay_in_bf16() -> None:
    model = small_model()
    optimizer = MasterWeightAdamW(model.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    update(model, optimizer)
    assert all(p.grad is None for p in [*model.parameters(), *optimizer.master_weights])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_weight_without_a_gradient_stays_where_it_is() -> None:
    moved, still = start(torch.bfloat16), start(torch.bfloat16)
    optimizer = MasterWeightAdamW([moved, still], lr=0.1)
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert not torch.equal(moved, start(torch.bfloat16))
    assert torch.equal(still, start(torch.bfloat16))


def test_groups_keep_their_own_settings() -> None:
    fast, slow = start(torch.bfloat16), start(torch.bfloat16)
    optimizer = MasterWeightAdamW([{"params": [fast], "lr": 0.1}, {"params": [slow], "lr": 0.01}], weight_decay=0.0)
    for weight in (fast, slow):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    first, second = (copy.detach() - start(torch.float32).detach() for copy in optimizer.master_weights)
    assert float(first.mean()) == pytest.approx(-0.1, rel=1e-3)
    assert float(second.mean()) == pytest.approx(-0.01, rel=1e-3)


def test_a_schedule_reaches_the_copies() -> None:
    weight = start(torch.bfloat16)
    optimizer = MasterWeightAdamW([weight], lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        schedule.step()
    way = optimizer.master_weights[0].detach() - start(torch.float32).detach()
    assert math.isclose(float(way.mean()), -0.1, rel_tol=1e-3)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_bnb_8bit", "sgd", "adafactor"])
def test_names_that_the_trainer_knows_are_taken(name: str) -> None:
    check_optimizer(name)


@pytest.mark.parametrize(
    ("name", "near"), [("adamw8bit", "adamw_8bit"), ("adamw_torc", "adamw_torch"), ("paged_adamw", "paged_adamw_8bit")]
)
def test_an_unknown_optimizer_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(LabError) as caught:
        check_optimizer(name)
    text: Any = str(caught.value)
    assert text.startswith(f"unknown optimizer '{name}'. Did you mean '{near}")
    assert "\n" not in text

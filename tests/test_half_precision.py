"""Half precision: rounding against float64, the loop against the Trainer, gradients against a count by hand."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lab import half_precision
from lab.errors import LabError
from lab.half_precision import RoundingAdamW, WideProducts, stochastic_bf16
from lab.runners import Outcome, execute
from lab.specs import HalfPrecision, LossScaling, Training
from lab.training import FineTuning
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK as TASK

DRAWS = 20_000


pytestmark = pytest.mark.usefixtures("one_thread")


# Rounding -------------------------------------------------------------------------------------------------------


def values(seed: int = 0, count: int = 40) -> Tensor:
    """fp32 values of both signs and many sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * torch.logspace(-30, 30, count, base=10.0)


def neighbours(of: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 values on both sides, that nearer to zero first, as float64."""
    inner = (of.view(torch.int32) & -(2**16)).view(torch.float32)
    outer = (inner.view(torch.int32) + 2**16).view(torch.float32)
    return inner.double(), outer.double()


def draws(of: Tensor) -> Tensor:
    """`(DRAWS, values)`, each rounded by chance, as float64."""
    return stochastic_bf16(of.expand(DRAWS, -1).contiguous(), torch.Generator().manual_seed(1)).double()


def bias(rounded: Tensor, of: Tensor) -> Tensor:
    """How far the mean of the rounded values is from the value, in steps of bf16."""
    inner, outer = neighbours(of)
    return ((rounded.mean(0) - of.double()) / (outer - inner)).abs()


def test_a_value_is_rounded_to_one_of_its_two_neighbours_and_in_the_mean_to_itself() -> None:
    of = values()
    found = draws(of)
    inner, outer = neighbours(of)
    assert bool(((found == inner) | (found == outer)).all())
    # The standard error of a mean of DRAWS values that are 0 or 1 is at most half a step by their root; five of these.
    bound = 5 * 0.5 / math.sqrt(DRAWS)
    assert float(bias(found, of).max()) < bound
    assert float(bias(of.bfloat16().double().expand(DRAWS, -1), of).max()) > 10 * bound, (
        "to nearest is no such rounding"
    )


def test_what_bf16_holds_exactly_and_what_is_no_number_stays() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-126, 3.0e38]).bfloat16().float()
    assert torch.equal(stochastic_bf16(exact.expand(500, -1).contiguous()).float(), exact.expand(500, -1))
    odd = stochastic_bf16(torch.tensor([math.inf, -math.inf, math.nan]).expand(500, -1).contiguous())
    assert bool((odd[:, 0] == math.inf).all() and (odd[:, 1] == -math.inf).all() and odd[:, 2].isnan().all())


def updated(rounding: Any, learning_rate: float, updates: int) -> tuple[Tensor, Tensor, RoundingAdamW]:
    """Weights before and after updates by constant gradients."""
    start = torch.full((DRAWS,), 0.05).bfloat16()
    weight = torch.nn.Parameter(start.clone())
    optimizer = RoundingAdamW([weight], rounding=rounding, lr=learning_rate, weight_decay=0.0)
    for _ in range(updates):
        weight.grad = torch.full_like(weight, 0.01)
        optimizer.step()
    return start, weight.detach(), optimizer


def test_small_updates_are_lost_to_nearest_and_are_there_in_the_mean_by_chance() -> None:
    rate, updates = 1e-5, 10  # a step of bf16 at 0.05 is 2^-12 = 2.4e-4
    start, nearest, _ = updated(lambda v: v.bfloat16(), rate, updates)
    assert torch.equal(nearest, start)
    generator = torch.Generator().manual_seed(0)
    _, by_chance, optimizer = updated(lambda v: stochastic_bf16(v, generator), rate, updates)
    reference = torch.nn.Parameter(start.double())
    exact = torch.optim.AdamW([reference], lr=rate, weight_decay=0.0)
    for _ in range(updates):
        reference.grad = torch.full_like(reference, 0.01)
        exact.step()
    way, expected = (by_chance.double() - start.double()).mean(), (reference.detach() - start.double()).mean()
    error = float((by_chance.double() - start.double()).std()) / math.sqrt(DRAWS)
    assert abs(float(way - expected)) < 5 * error < 0.1 * abs(float(expected))
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert sum(t.nbytes for t in state.values() if isinstance(t, Tensor)) == 4 * DRAWS


def test_large_updates_are_those_of_torch_s_adamw() -> None:
    start, found, _ = updated(lambda v: v.bfloat16(), 1e-2, 3)
    weight = torch.nn.Parameter(start.clone())
    plain = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        weight.grad = torch.full_like(weight, 0.01)
        plain.step()
    assert torch.allclose(found.float(), weight.detach().float(), rtol=0.02, atol=0)


# Products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_product_is_that_of_float64_rounded_once_forward_and_backward(half: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(24, 24, generator=generator).to(half).requires_grad_() for _ in range(2))
    with WideProducts():
        found = a @ b
        found.sum().backward()
    exact = a.detach().double() @ b.detach().double()
    step = torch.finfo(half).eps
    assert float((found.detach().double() - exact).abs().div(exact.abs() + 1e-2).max()) < step
    assert a.grad is not None
    assert a.grad.dtype == found.dtype == half
    assert torch.allclose(a.grad.double(), b.detach().double().sum(1).expand(24, -1), rtol=step, atol=step)


def test_a_product_beyond_fp16_overflows_and_one_in_fp32_is_left_alone() -> None:
    large = torch.full((4, 4), 200.0)
    with WideProducts():
        assert bool((large.half() @ large.half()).isinf().all())
        assert float((large @ large)[0, 0]) == 160_000.0
        assert bool((large.bfloat16() @ large.bfloat16()).isfinite().all())


# Training -------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> HalfPrecision:
    plain: dict[str, Any] = {"model": "tiny", "task": TASK, "updates": 3, "micro_batch_size": 4, "evaluations": 0}
    return HalfPrecision(**{**plain, "learning_rates": (1e-3,), "questions": 8, **changes})


def trained(workspace: Workspace, **changes: Any) -> Outcome:
    return execute(settings(**changes), workspace)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-master"])
def test_the_loop_gives_the_losses_of_the_trainer(precision: Any, tiny_workspace: Workspace) -> None:
    same = {"precision": precision, "updates": 4}
    run = FineTuning(settings(**same), tiny_workspace)
    found = half_precision.train(run, half_precision.first_batches(run, 4), settings(**same), 1e-2)
    common = {**settings(**same).model_dump(include=set(Training.model_fields) - {"kind"}), "learning_rate": 1e-2}
    reference = FineTuning(Training(**common), tiny_workspace)
    reference.train()
    assert found.losses == pytest.approx(reference.losses, rel=2e-4 if precision == "fp32" else 2e-2)
    assert found.losses[0] > found.losses[-1]
    assert run.data_order() == reference.data_order()


def test_every_rate_starts_from_the_same_weights(tiny_workspace: Workspace) -> None:
    both = trained(tiny_workspace, learning_rates=(1e-1, 1e-3))
    alone = trained(tiny_workspace, learning_rates=(1e-3,))
    assert both.figures == alone.figures
    assert [values[1] for values in both.series.values()] == [values[0] for values in alone.series.values()]
    assert both.series["test_loss"][0] != both.series["test_loss"][1]


def test_bf16_weights_stop_moving_at_a_small_rate_and_with_a_master_copy_or_by_chance_they_do_not(
    tiny_workspace: Workspace,
) -> None:
    rates = (1e-6, 1e-1)
    same = {"learning_rates": rates, "updates": 4}
    fp32 = trained(tiny_workspace, **same).series
    bf16 = trained(tiny_workspace, precision="bf16", **same).series
    chance = trained(tiny_workspace, precision="bf16", stochastic_rounding=True, **same).series
    assert fp32["changed"][0] > 0.9
    assert bf16["changed"][0] < 0.05 < 0.9 < bf16["changed"][1]
    assert chance["moved"][0] > bf16["moved"][0]
    assert chance["moved"][0] > chance["changed"][0], "which weights change differs from update to update"
    assert fp32["scale"] == bf16["scale"] == [1.0, 1.0]


def test_plain_fp16_breaks_in_its_first_update_and_the_next_rate_is_tried(tiny_workspace: Workspace) -> None:
    found = trained(tiny_workspace, precision="fp16", learning_rates=(1e-4, 1e-3))
    assert found.series["broke"] == [1, 1]
    assert all(math.isnan(loss) for loss in found.series["test_loss"])
    assert math.isfinite(found.figures["base_test_loss"])
    assert not found.diverged


def test_an_overflow_leaves_an_update_out_and_lowers_the_scale(
    tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    amp: dict[str, Any] = {"precision": "autocast", "half": "fp16", "loss_scaling": True}
    usual = trained(tiny_workspace, **amp).series
    assert (usual["skipped"][0], usual["broke"][0]) == (0, 0)
    assert usual["scale"][0] == 2.0**16
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**40))
    high = trained(tiny_workspace, **amp).series
    assert (high["skipped"][0], high["broke"][0], high["changed"][0]) == (3, 0, 0.0)
    assert high["scale"][0] == 2.0**37


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"loss_scaling": True, "precision": "fp16"},
            r"half-precision: loss_scaling with precision fp16; torch scales back fp32 gradients alone\. Set precision to auto",
        ),
        (
            {"stochastic_rounding": True},
            r"half-precision: stochastic_rounding with precision fp32; it rounds bf16 weights\. Set precision to bf16",
        ),
    ],
)
def test_what_has_nothing_to_work_on_is_refused(changes: dict[str, Any], said: str, tiny_workspace: Workspace) -> None:
    with pytest.raises(LabError, match=said):
        trained(tiny_workspace, **changes)


# Gradients ------------------------------------------------------------------------------------------------------


def test_gradients_are_lost_below_the_smallest_scale_and_overflow_above_the_largest(tiny_workspace: Workspace) -> None:
    exponents = (-20, 0, 8, 16, 40)
    probe = LossScaling(model="tiny", task=TASK, updates=2, micro_batch_size=4, exponents=exponents)
    found = execute(probe, tiny_workspace)
    assert found.series["exponent"] == list(exponents)
    for when in ("base", "tuned"):
        lost, over = found.series[f"{when}_lost"], found.series[f"{when}_overflowed"]
        assert lost[0] > 0.9
        assert lost[0] > lost[1] >= lost[2] >= lost[3]
        assert over == [0.0, 0.0, 0.0, 0.0, 1.0]
        error = found.series[f"{when}_error"]
        assert error[3] < found.figures[f"{when}_bf16_error"] < 0.05
        assert math.isnan(error[4])
        assert found.figures[f"{when}_bf16_lost"] < 1e-3
    assert found.figures["tuned_loss"] < found.figures["base_loss"]
    assert execute(probe, tiny_workspace).figures == found.figures


def test_the_share_that_is_lost_and_the_error_are_those_of_a_count_by_hand() -> None:
    reference = [torch.tensor([1.0, 1e-9, 0.0, -1e-9]), torch.tensor([[2.0, 1e-3]])]
    found = [tensor.half().float() for tensor in reference]
    assert half_precision.lost(found, reference) == 2 / 5
    halved = [tensor / 2 for tensor in reference]
    assert half_precision.error(halved, reference) == pytest.approx(0.5)
    assert half_precision.lost(halved, reference) == 0
    assert half_precision.error(reference, reference) == 0
    assert half_precision.differing(halved, reference) == 5 / 6

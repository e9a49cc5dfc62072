"""Shadows behave as tensors on the processor do, in all but their values."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lab.memory.shadows import Shadow, ShadowMode
from lab.memory.simulation import predict
from lab.memory.workload import Workload
from lab.models import shapes

functional = nn.functional

OPERATORS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum with a broadcast": lambda a, b: a + b[0],
    "type promotion": lambda a, b: (a.bfloat16() * 2, a.long() * 2, a.long() * 2.0, a.bool() * True),
    "product": lambda a, b: a @ b.T,
    "linear": lambda a, b: functional.linear(a, b, b[:, 0]),
    "in place": lambda a, b: a.add_(b).mul_(2),
    "lists in place": lambda a, b: torch._foreach_add_([a, b], 1.0),
    "lists": lambda a, b: torch._foreach_sqrt([a, b]),
    "views": lambda a, b: (a[1:], a.view(-1), a.T, a.unsqueeze(0).expand(3, -1, -1)),
    "many results": lambda a, b: a.max(dim=1),
    "mixed with a real one": lambda a, b: torch.cat([a, torch.tensor([[1.0] * 6])]),
    "layer norm in bf16": lambda a, b: torch.native_layer_norm(a.bfloat16(), [6], b[0].bfloat16(), None, 1e-5),
    "attention": lambda a, b: functional.scaled_dot_product_attention(a[None, None], a[None, None], b[None, None]),
}


def layout(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage().nbytes()
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, storage


def run(operator: Callable[[Tensor, Tensor], Any]) -> list[tuple[Any, ...]]:
    results = operator(torch.ones(4, 6), torch.ones(4, 6))
    results = [results] if isinstance(results, Tensor) else list(results or [])
    return [layout(tensor) for tensor in results]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_shadow_has_the_layout_of_the_real_tensor(name: str) -> None:
    real = run(OPERATORS[name])
    with ShadowMode():
        first, again = run(OPERATORS[name]), run(OPERATORS[name])
    assert first == again == real


@pytest.mark.parametrize("amp", [False, True])
def test_autograd_and_autocast_take_the_same_path(amp: bool) -> None:
    def gradients() -> list[Any]:
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            output = model(torch.ones(3, 6))
        output.float().sum().backward()
        return [output.dtype, *(layout(p.grad) for p in model.parameters() if p.grad is not None)]

    real = gradients()
    with ShadowMode():
        assert gradients() == real


def test_views_share_a_storage_and_new_tensors_do_not() -> None:
    with ShadowMode():
        tensor = torch.empty(4, 6)
        storages = [t.untyped_storage()._cdata for t in (tensor, tensor.T, tensor.add_(1), tensor + 1, tensor + 1)]
    assert [storages.index(s) for s in storages] == [0, 0, 0, 3, 4]


def test_a_tensor_of_given_values_stays_real() -> None:
    with ShadowMode():
        steps = torch.tensor(3.0)
        steps += 1
        assert steps.item() == 4
        assert isinstance(torch.ones(2) * steps, Shadow)


def test_a_shadow_has_no_values() -> None:
    with ShadowMode():
        tensor = torch.zeros(1)
        with pytest.raises((RuntimeError, NotImplementedError)):
            tensor.item()
    with pytest.raises(RuntimeError, match="inside ShadowMode alone"):
        tensor.add(1)


def test_a_meta_kernel_runs_once_for_each_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, on_meta = [], ShadowMode._on_meta

    def counted(self: ShadowMode, func: Any, *rest: Any) -> Any:
        ran.append(str(func))
        return on_meta(self, func, *rest)

    monkeypatch.setattr(ShadowMode, "_on_meta", counted)
    with ShadowMode():
        for size in (2, 3, 2, 3, 2):
            torch.exp(torch.empty(size))
    assert ran == ["aten.empty.memory_format", "aten.exp.default"] * 2


def test_on_cuda_the_statistics_of_a_layer_norm_are_fp32() -> None:
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
        with ShadowMode(device):
            x = torch.ones(4, 6, dtype=torch.bfloat16)
            _, mean, _ = torch.native_layer_norm(x, [6], x[0], None, 1e-5)
            assert mean.dtype == dtype


# Speed ----------------------------------------------------------------------------------------------------------


def test_a_prediction_takes_a_second_or_so() -> None:
    """0.5 s on two cores that were otherwise idle, and 1.4 s under FakeTensorMode."""
    config = json.loads(shapes()["llama-3.1-8b"].read_text())
    workload = Workload(config=config, method="lora", batch=4, length=2048)
    predict(workload)  # imports
    start = time.process_time()
    predict(workload)
    assert time.process_time() - start < 2

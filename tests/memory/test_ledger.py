"""The ledger against byte counts worked out by hand, and against faults planted in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lab.errors import LabError
from lab.memory import ledger as ledger_module
from lab.memory import measurement
from lab.memory.ledger import Ledger, gradients, held_bytes, tensors_in, weights
from lab.memory.measurement import Measurement, measure, parameter_counts, watch

FLOAT, LONG = 4, 8


pytestmark = pytest.mark.usefixtures("one_thread")


# Checks: each takes the ledger's class, so that a faulty one can be put in its place.


def check_release(make: type[Ledger]) -> None:
    with make() as ledger:
        first, second = torch.empty(10), torch.empty(3)
        assert ledger.live_bytes == 13 * FLOAT
        del first
        assert ledger.live_bytes == 3 * FLOAT
    del second
    assert ledger.live_bytes == 0


def check_release_by_the_graph(make: type[Ledger]) -> None:
    with make() as ledger:
        weight = torch.ones(3, requires_grad=True)
        product = weight * torch.empty(3)  # only the graph keeps the second factor, until backward
        assert ledger.live_bytes == 9 * FLOAT
        product.backward(torch.ones(3))
        assert ledger.live_bytes == 9 * FLOAT  # weight, product, gradient
    assert weight.grad is not None


def check_views(make: type[Ledger]) -> None:
    with make() as ledger:
        whole = torch.empty(4, 5)
        rows, column = whole[:2], whole.t()[0]
        assert ledger.live_bytes == ledger.bytes_of([whole, rows, column]) == 20 * FLOAT
        del whole, rows
        assert ledger.live_bytes == ledger.bytes_of([column]) == 20 * FLOAT  # one column keeps all of it
        del column
        assert ledger.live_bytes == 0


def check_ties(make: type[Ledger]) -> None:
    embedding, head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
    head.weight = embedding.weight
    ledger = make()
    ledger.adopt([embedding.weight, head.weight, embedding.weight.detach()])
    assert ledger.live_bytes == ledger.bytes_of([embedding.weight, head.weight.detach()]) == 21 * FLOAT


def check_temporaries(make: type[Ledger]) -> None:
    with make() as ledger:
        x = torch.empty(10)
        ledger.enter_phase("out of place")
        x = (x + 1) * 2  # both results and x are alive at once, for a moment
        ledger.enter_phase("in place")
        x.add_(1).mul_(2)
    assert ledger.peaks == {"idle": 10 * FLOAT, "out of place": 30 * FLOAT, "in place": 10 * FLOAT}


def check_resizes(make: type[Ledger]) -> None:
    with make() as ledger:
        x = torch.empty(4)
        x.resize_(9)
        assert ledger.live_bytes == 9 * FLOAT
        x.untyped_storage().resize_(0)
        assert ledger.live_bytes == 0
        x.untyped_storage().resize_(9 * FLOAT)
        assert ledger.live_bytes == 9 * FLOAT


CHECKS = [
    check_release,
    check_release_by_the_graph,
    check_views,
    check_ties,
    check_temporaries,
    check_resizes,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_ledger_counts_by_hand(check: Callable[[type[Ledger]], None]) -> None:
    check(Ledger)


class Deaf(Ledger):
    """Hears no release."""

    def _release(self, key: int, _: Any) -> None:
        self._entries.pop(key)


class Blind(Ledger):
    """Sees peaks only where phases begin."""

    def _set_size(self, entry: Any, size: int) -> None:
        peaks = dict(self.peaks)
        super()._set_size(entry, size)
        self.peaks = peaks


class Rigid(Ledger):
    """Keeps the first size of a storage."""

    def _set_size(self, entry: Any, size: int) -> None:
        if entry.size == 0:
            super()._set_size(entry, size)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (Deaf, check_release),
        (Deaf, check_release_by_the_graph),
        (Deaf, check_views),
        (Deaf, check_temporaries),
        (Blind, check_temporaries),
        (Rigid, check_resizes),
    ],
)
def test_a_faulty_ledger_is_told_apart(fault: type[Ledger], check: Callable[[type[Ledger]], None]) -> None:
    with pytest.raises(AssertionError):
        check(fault)


@pytest.mark.parametrize("check", [check_views, check_ties])
def test_counting_each_tensor_is_told_apart(
    check: Callable[[type[Ledger]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_tensor(tensors: Iterable[Tensor]) -> dict[int, Any]:
        return {id(tensor) + number: tensor.untyped_storage() for number, tensor in enumerate(tensors)}

    monkeypatch.setattr(ledger_module, "storages_of", by_tensor)
    with pytest.raises(AssertionError):
        check(Ledger)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["new", "view", "copy", "grow", "release"]), st.integers(0, 40)), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, round_to=st.sampled_from([1, 512]))
def test_live_bytes_are_the_sum_of_live_storages(actions: list[tuple[str, int]], round_to: int) -> None:
    names: list[tuple[Tensor, int]] = []  # a tensor, and the number of the storage behind it
    sizes: dict[int, int] = {}  # elements by storage, as the actions say
    peak = 0

    def expected() -> int:
        alive = {storage for _, storage in names}
        return sum(-(-sizes[storage] * FLOAT // round_to) * round_to for storage in alive)

    with Ledger(round_to) as ledger:
        for action, n in actions:
            if action == "new" or not names:
                names.append((torch.empty(n), len(sizes)))
                sizes[len(sizes)] = n
            elif action == "view":
                tensor, storage = names[n % len(names)]
                names.append((tensor[: n // 2], storage))
            elif action == "copy":
                copy = names[n % len(names)][0].clone()
                names.append((copy, len(sizes)))
                sizes[len(sizes)] = copy.numel()
            elif action == "grow":
                tensor, storage = names[n % len(names)]
                tensor.untyped_storage().resize_((sizes[storage] + n) * FLOAT)
                sizes[storage] += n
            else:
                names.pop(n % len(names))
            tensor = copy = None  # type: ignore[assignment]
            assert ledger.live_bytes == expected()
            peak = max(peak, ledger.live_bytes)
        assert ledger.peaks == {"idle": peak}
        names.clear()
        assert ledger.live_bytes == 0


def test_storages_on_meta_and_on_other_devices_are_not_counted() -> None:
    with Ledger() as every, Ledger(device="cuda") as cuda:
        kept = [torch.empty(10, device="meta"), torch.empty(2)]
        assert (every.live_bytes, cuda.live_bytes) == (2 * FLOAT, 0)
    assert held_bytes(kept) == 12 * FLOAT


def test_a_sparse_gradient_counts_as_indices_and_values() -> None:
    embedding = nn.Embedding(50, 3, sparse=True)
    with Ledger() as ledger:
        ids = torch.tensor([4, 9])
        embedding(ids).sum().backward()
        gradient = list(gradients(embedding))
        assert ledger.bytes_of(gradient) == 2 * LONG + 2 * 3 * FLOAT
        assert ledger.live_bytes == 2 * LONG + ledger.bytes_of(gradient)


def test_a_wrapper_subclass_counts_as_its_parts_with_their_temporaries() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with Ledger() as ledger:
        pair = TwoTensor(torch.empty(6), torch.empty(6))
        assert ledger.live_bytes == ledger.bytes_of([pair]) == 12 * FLOAT
        doubled = pair * 2
        assert ledger.live_bytes == 24 * FLOAT
        del pair
        assert ledger.live_bytes == ledger.bytes_of([doubled]) == 12 * FLOAT


class Nested(torch.autograd.Function):
    """Runs another backward pass inside its own, `depth` deep: past 60 the engine moves to another thread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, threads: set[int]) -> Tensor:
        ctx.depth, ctx.threads = depth, threads
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.threads.add(threading.get_ident())
        with torch.enable_grad():
            leaf = torch.ones(5, requires_grad=True)
            inner = Nested.apply(leaf, ctx.depth - 1, ctx.threads) if ctx.depth else leaf * 2
        inner.backward(torch.ones(5))
        ctx.kept = torch.empty(100_000) if ctx.depth == 0 else None  # dies with this node
        return gradients[0], None, None


def test_a_backward_pass_on_another_thread_is_heard() -> None:
    threads: set[int] = set()
    with Ledger() as ledger:
        x = torch.ones(5, requires_grad=True)
        Nested.apply(x, 70, threads).sum().backward()
        assert len(threads) > 1
        assert ledger.live_bytes == ledger.bytes_of(t for t in (x, x.grad) if t is not None)
        assert ledger.peaks["idle"] > 100_000 * FLOAT  # made there, far above the rest


def test_on_cuda_each_phase_keeps_its_highest_allocator_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([9, 90, 5, 50, 7, 70, 3, 30])  # no GPU needed: what the allocator would say at each change
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(readings))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: next(readings))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    ledger = Ledger(512, "cuda")
    ledger.reset()  # the first reading belongs to what was before
    for phase in ("forward", "idle", "forward"):
        ledger.enter_phase(phase)
    assert ledger.allocator_peaks == {"idle": (5, 50), "forward": (7, 70)}


def test_the_mode_leaves_resize_as_it_found_it() -> None:
    before = torch.UntypedStorage.resize_
    with Ledger(), Ledger():
        assert torch.UntypedStorage.resize_ is not before
    assert torch.UntypedStorage.resize_ is before


def test_rounding_below_one_is_refused() -> None:
    with pytest.raises(LabError, match=r"^Ledger: round_to is 0; it must be at least 1\. Take 1 for bytes"):
        Ledger(0)


# A linear layer, 7 -> 3 with bias, batch of 5, by hand.

WEIGHT, BIAS, INPUT, OUTPUT = 21 * FLOAT, 3 * FLOAT, 35 * FLOAT, 15 * FLOAT


@pytest.mark.parametrize(
    ("foreach", "temporary"),
    [
        # One list of roots of the second moments, as large as the parameters.
        (True, WEIGHT + BIAS),
        # sqrt(second moment) and its quotient by the bias correction, for the weight.
        (False, 2 * WEIGHT),
    ],
)
def test_a_linear_layer_under_adamw(foreach: bool, temporary: int) -> None:
    layer, x = nn.Linear(7, 3), torch.randn(5, 7)
    optimizer = AdamW(layer.parameters(), foreach=foreach)
    ledger = Ledger()
    ledger.adopt([*weights(layer), x])
    parameters = WEIGHT + BIAS
    state = 2 * parameters + 2 * FLOAT  # two moments, a step counter for each tensor
    with ledger, watch(ledger, layer, optimizer) as seen:
        for _ in range(2):
            seen.clear()
            loss = layer(x).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
        assert ledger.live_bytes == parameters + INPUT + state
        assert ledger.parts.total == ledger.live_bytes
    at_rest = parameters + INPUT + state
    assert seen.end_of_forward is not None
    assert seen.step_start is not None
    assert vars(seen.end_of_forward) == {
        "weights": parameters,
        "gradients": 0,
        "optimizer": state,
        "activations": OUTPUT,
        "logits": 0,
        "temporaries": 0,
        "inputs": INPUT,
        "other": 0,
    }
    assert vars(seen.step_start) == {
        "weights": parameters,
        "gradients": parameters,
        "optimizer": state,
        "activations": 0,
        "logits": 0,
        "temporaries": 0,
        "inputs": INPUT,
        "other": FLOAT,  # the loss
    }
    # The sum frees the output: its gradient is a view of one element.
    assert ledger.peaks["forward"] == at_rest + OUTPUT + FLOAT
    assert ledger.peaks["backward"] == at_rest + 2 * FLOAT + parameters  # the loss, its gradient, both gradients
    assert ledger.peaks["step"] - seen.step_start.total == temporary


def test_sgd_in_place_has_no_temporary() -> None:
    layer, x = nn.Linear(7, 3), torch.randn(5, 7)
    optimizer = SGD(layer.parameters(), lr=0.1, foreach=False)
    ledger = Ledger()
    ledger.adopt([*weights(layer), x])
    with ledger, watch(ledger, layer, optimizer) as seen:
        layer(x).sum().backward()
        optimizer.step()
    assert seen.step_start is not None
    assert ledger.peaks["step"] == seen.step_start.total == 2 * (WEIGHT + BIAS) + INPUT


def test_forward_passes_without_gradients_are_idle_and_hooks_go_with_the_block() -> None:
    layer, x = nn.Linear(7, 3), torch.randn(5, 7)
    optimizer = SGD(layer.parameters(), lr=0.1)
    ledger = Ledger()
    with ledger:
        with watch(ledger, layer, optimizer), torch.no_grad():
            layer(x)
        layer(x).sum().backward()
        optimizer.step()
    assert set(ledger.peaks) == {"idle"}


# A tiny Llama in the Trainer.

BATCH, TOKENS, VOCABULARY, HIDDEN = 2, 10, 96, 32


def tiny_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | changes, use_cache=False)).to(dtype)


def trainer_for(model: nn.Module, folder: Path, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = [torch.arange(start, start + TOKENS) % VOCABULARY for start in range(32)]
    quiet = {
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    defaults = {"max_steps": 2, "per_device_train_batch_size": BATCH, "optim": "adamw_torch"}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **quiet | defaults | arguments),
        train_dataset=rows,
        data_collator=lambda picked: {"input_ids": torch.stack(picked), "labels": torch.stack(picked)},
    )


def check_totals(found: Measurement, model: nn.Module, per_parameter: int, state_per_parameter: int) -> None:
    parameters, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    buffers = held_bytes(model.buffers())
    assert found.parameters == {"total": parameters, "trainable": parameters, "stored": parameters}
    assert found.end_of_forward.weights == parameters * per_parameter + buffers
    assert found.step_start.gradients == parameters * per_parameter
    assert found.steady.optimizer == parameters * state_per_parameter + tensors * FLOAT
    assert found.steady.optimizer == sum(found.optimizer_state_by_parameter.values())
    assert found.end_of_forward.gradients == found.steady.gradients == 0
    assert found.steady.activations == found.step_start.activations == 0
    # The largest tensor is the head: root and quotient, with mlp.down_proj's denominator still alive.
    assert found.step_temporary == (2 * VOCABULARY * HIDDEN + 48 * HIDDEN) * per_parameter
    assert found.parts_at_peak["step"].temporaries == found.step_temporary
    assert all(found.parts_at_peak[phase].total == peak for phase, peak in found.peaks.items())


def test_fp32_holds_4_4_and_8_bytes_per_parameter(tmp_path: Path) -> None:
    model = tiny_llama()
    found = measure(trainer_for(model, tmp_path))
    check_totals(found, model, FLOAT, 2 * FLOAT)
    # ids and labels; the count of labels is an int32, in older transformers an int64.
    assert found.end_of_forward.inputs - 2 * BATCH * TOKENS * LONG in (FLOAT, LONG)
    assert found.end_of_forward.logits == 2 * BATCH * TOKENS * VOCABULARY * FLOAT  # and their log-probabilities
    assert found.optimizer_state_by_parameter["lm_head.weight"] == VOCABULARY * HIDDEN * 2 * FLOAT + FLOAT
    assert found.gradients_between == ()
    assert found.peak_phase == "step"
    assert found.peaks["forward"] >= found.end_of_forward.total


def test_pure_bf16_holds_2_2_and_4_bytes_per_parameter(tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16)
    found = measure(trainer_for(model, tmp_path))
    check_totals(found, model, 2, 4)
    assert found.end_of_forward.logits == BATCH * TOKENS * VOCABULARY * (2 + FLOAT)  # log-probabilities are fp32


@pytest.mark.parametrize("fault", [Deaf, Blind])
def test_a_faulty_measurement_is_told_apart(
    fault: type[Ledger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "Ledger", fault)
    model = tiny_llama()
    found = measure(trainer_for(model, tmp_path))
    with pytest.raises(AssertionError):
        check_totals(found, model, FLOAT, 2 * FLOAT)


@pytest.mark.parametrize("foreach", [False, True])
def test_the_peak_is_what_the_cpu_allocator_hands_out(foreach: bool) -> None:
    from torch.profiler import ProfilerActivity, profile

    model, ids = tiny_llama().train(), torch.arange(BATCH * TOKENS).view(BATCH, TOKENS)
    optimizer = AdamW(model.parameters(), foreach=foreach)

    def update() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    update()  # from here on the state exists
    ledger = Ledger()
    ledger.adopt([*weights(model), *tensors_in(list(optimizer.state.values())), ids])
    with ledger, watch(ledger, model, optimizer) as seen:
        seen.clear()
        before = ledger.live_bytes
        update()
        assert ledger.live_bytes == before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
    events = profiler.profiler.kineto_results.events()
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    running = list(accumulate(size for _, size in steps))
    assert running[-1] == 0
    # Measured: 12 bytes, numbers that C++ wraps as tensors inside an operator, of 111,360 and 173,312.
    assert 0 <= max(running) - (max(ledger.peaks.values()) - before) <= 64


def test_the_measurement_repeats_to_the_byte_and_leaves_training_as_it_was(tmp_path: Path) -> None:
    plain, watched = tiny_llama(), tiny_llama()
    trainer_for(plain, tmp_path, max_steps=3).train()
    found = measure(trainer_for(watched, tmp_path, max_steps=3))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert found == measure(trainer_for(tiny_llama(), tmp_path))


def test_accumulation_holds_gradients_between_micro_batches(tmp_path: Path) -> None:
    found = measure(trainer_for(tiny_llama(), tmp_path, gradient_accumulation_steps=3))
    size = found.parameters["total"] * FLOAT
    assert found.gradients_between == (size, size)
    assert found.end_of_forward.gradients == found.step_start.gradients == size
    assert found.steady.gradients == 0
    # On the CPU the Trainer holds all micro-batches of the update from its beginning to its end.
    assert found.end_of_forward.inputs - 3 * 2 * BATCH * TOKENS * LONG in (FLOAT, LONG)


def test_autocast_keeps_fp32_weights_and_casts_them_among_the_activations(tmp_path: Path) -> None:
    plain = measure(trainer_for(tiny_llama(), tmp_path))
    found = measure(trainer_for(tiny_llama(), tmp_path, bf16=True))
    assert found.end_of_forward.weights == plain.end_of_forward.weights
    assert found.step_start.gradients == plain.step_start.gradients
    # accelerate returns an fp32 copy of the logits; the bf16 ones are gone, the log-probabilities are not.
    assert found.end_of_forward.logits == 2 * BATCH * TOKENS * VOCABULARY * FLOAT


def test_checkpointing_moves_activations_from_forward_to_backward(tmp_path: Path) -> None:
    plain = measure(trainer_for(tiny_llama(), tmp_path))
    found = measure(trainer_for(tiny_llama(), tmp_path, gradient_checkpointing=True))
    assert found.end_of_forward.activations < plain.end_of_forward.activations / 4
    assert found.peaks["forward"] < found.peaks["backward"] < plain.peaks["backward"]
    assert found.step_start == plain.step_start


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    found = measure(trainer_for(model, tmp_path))
    untied = parameter_counts(tiny_llama())["total"]
    assert found.parameters["total"] == untied - VOCABULARY * HIDDEN
    assert found.steady.weights == found.parameters["total"] * FLOAT + held_bytes(model.buffers())
    assert found.step_start.gradients == found.parameters["total"] * FLOAT


def test_frozen_parameters_hold_no_gradient_and_no_state(tmp_path: Path) -> None:
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    found = measure(trainer_for(model, tmp_path))
    assert 0 < found.parameters["trainable"] < found.parameters["total"]
    assert found.step_start.gradients == found.parameters["trainable"] * FLOAT
    assert all("layers.1" in name for name in found.optimizer_state_by_parameter)


def test_8_bit_adam_shares_its_tables(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_llama(vocab_size=256, hidden_size=32, intermediate_size=256)
    found = measure(trainer_for(model, tmp_path, optim="adamw_bnb_8bit"))
    state = found.optimizer_state_by_parameter
    large = 256 * 32  # two moments of a byte, two fp32 scales per 256 elements
    assert state["model.layers.0.mlp.up_proj.weight"] == 2 * large + 2 * FLOAT * large // 256
    assert state["model.norm.weight"] == 32 * 2 * FLOAT
    assert state["shared"] == 2 * 256 * FLOAT
    assert sum(state.values()) == found.steady.optimizer
    assert found.step_temporary == 0


@pytest.mark.parametrize("double", [False, True])
def test_4_bit_weights_count_with_their_tables(double: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(
        256, 128, bias=False, quant_type="nf4", compress_statistics=double, compute_dtype=torch.float32
    )
    layer = layer.to("cpu")
    blocks = 256 * 128 // 64
    tables = blocks + FLOAT * -(-blocks // 256) + 256 * FLOAT + FLOAT if double else blocks * FLOAT
    assert held_bytes(weights(layer)) == 256 * 128 // 2 + tables + 16 * FLOAT
    assert parameter_counts(layer) == {"total": 256 * 128, "trainable": 0, "stored": 256 * 128 // 2}


def test_8_bit_weights_count_with_their_scales_before_and_after_the_first_forward() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False).to("cpu")
    expected = 64 * 32 + 32 * FLOAT
    assert held_bytes(weights(layer)) == expected
    layer(torch.randn(2, 64, dtype=torch.bfloat16))
    assert held_bytes(weights(layer)) == expected


def test_one_update_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"^measure: 1 complete update\(s\); .* Set max_steps to 2 or more\.$"):
        measure(trainer_for(tiny_llama(), tmp_path, max_steps=1))

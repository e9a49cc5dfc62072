"""The lecture, whole: every statement in it that can be wrong is a claim of the registry, with the tiers that it needs."""

from __future__ import annotations

import pytest

from lab.claims import discover

LECTURE = {
    # section 1: hub and libraries
    "hub-pinned-revision": "cpu",
    "tokenizer-belongs-to-model": "cpu",
    "datasets-scale-past-memory": "cpu",
    "trl-covers-rlhf": "cpu, gpu",
    "pretrained-start": "cpu",
    # section 2: memory
    "weights-bytes": "sim, cpu, gpu",
    "gradients-equal-weights": "sim, cpu, gpu",
    "adamw-12-bytes": "sim, cpu, gpu",
    "adamw8bit-6-bytes": "sim, cpu, gpu",
    "four-parts-explain-peak": "sim, cpu, gpu",
    "batch-and-length-drive-activations": "sim, cpu, gpu",
    "prediction-matches-measurement": "cpu, gpu",
    # section 3: parameter-efficient fine-tuning
    "peft-trains-few-parameters": "sim, cpu",
    "peft-saves-memory": "sim, cpu, gpu",
    "peft-trains-faster": "cpu, gpu",
    "quantised-peft-is-cheaper": "sim, cpu, gpu",
    "peft-keeps-quality": "cpu, gpu",
    "full-ft-forgets-more": "cpu, gpu",
    "peft-beats-icl": "cpu, gpu",
    "one-base-many-adapters": "cpu",
    "domain-specialisation": "cpu, gpu",
    "little-data-suffices": "cpu, gpu",
    "full-ft-at-least-peft": "cpu, gpu",
    "full-ft-costs-more": "cpu, gpu",
    "adapter-inserts-modules": "cpu",
    "prompt-tuning-is-input-only": "cpu",
    "prefix-tuning-acts-per-layer": "cpu",
    "p-tuning-uses-an-encoder": "cpu",
    "lora-is-low-rank": "cpu",
    "ia3-rescales": "cpu",
    "mora-is-high-rank": "cpu",
    "dora-splits-magnitude-and-direction": "cpu, gpu",
    # section 4: one gpu
    "half-precision-relieves-memory": "sim, cpu, gpu",
    "grad-accumulation-equals-large-batch": "cpu, gpu",
    "checkpointing-trades-compute-for-memory": "sim, cpu, gpu",
    "model-size-limit": "sim, gpu",
    "inference-needs-resources": "sim, cpu, gpu",
    "qlora-fits-where-lora-does-not": "sim, gpu",
    "smaller-model-trade-off": "cpu, gpu",
    "adamw8bit-matches-adamw": "cpu, gpu",
    "paged-adamw-pages": "gpu",
    "optimizer-choice": "sim, cpu, gpu",
    # ours
    "lab-trainer-is-as-fast": "cpu, gpu",
}
"""By claim, the tiers in which it must have evidence, or say that it was not run."""


@pytest.mark.parametrize("claim", LECTURE)
def test_every_claim_of_the_lecture_is_in_the_registry_with_its_tiers(claim: str) -> None:
    claims = discover().claims
    assert claim in claims
    assert set(LECTURE[claim].split(", ")) <= set(claims[claim][1].tiers)


def test_every_claim_of_the_registry_is_one_of_the_lecture() -> None:
    assert set(discover().claims) == set(LECTURE)

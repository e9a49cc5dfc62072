"""The judge of tokenizers, on made-up records: each part can fail, and both controls say otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import tokenizers
from experiments.tokenizers import COST, FOREIGN, KNOWN, LEAD, RATIO, ModelParams, Params
from lab.claims import Evidence, Verdict, judge
from lab.params import Profile
from lab.records import Record
from lab.specs import Tokenizing, TrialSpec
from tests.test_records import make_record

CLAIM = tokenizers.EXPERIMENT.claims[0]
CUTS = {"tiny": ("own", "permuted", "borrowed", "retrained"), "smol": ("own", "permuted", "borrowed")}
TEXTS = ("english", "korean", "stories")


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """Every figure and series that a trial of this experiment leaves."""
    settings = spec.settings
    assert isinstance(settings, Tokenizing)
    return figures(settings.seed) | series()


def figures(seed: int, cost: float = 3.0, lead: float = 1.0) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cut in CUTS["tiny"]:
        for text in TEXTS:
            bits = 1.0 + (cost + 0.001 * seed) * (cut != "own")
            found |= {f"{cut}_{text}_bits_per_byte": bits, f"{cut}_{text}_tokens_per_byte": 0.25}
            found |= {f"{cut}_{text}_tokens_per_character": 0.25, f"{cut}_{text}_fallback_share": 0.0}
    trained = {"kept": 0.4, "own": 0.8, "retrained": 0.8 + lead + 0.001 * seed}
    return found | {f"trained_{name}_bits_per_byte": value for name, value in trained.items()}


def series(ratio: float = 8.0) -> dict[str, list[float]]:
    """Two paragraphs in each language, a Korean character taking so many times the tokens of an English one."""
    return {
        "english_tokens": [25.0, 50.0],
        "english_characters": [100.0, 200.0],
        "english_bytes": [100.0, 200.0],
        "korean_tokens": [12.5 * ratio * 0.99, 25.0 * ratio * 1.01],
        "korean_characters": [50.0, 100.0],
        "korean_bytes": [120.0, 240.0],
    }


def record(model: str, seed: int, cost: float = 3.0, lead: float = 1.0, ratio: float = 8.0) -> Record:
    settings = Tokenizing.model_validate(
        {"model": model, "cuts": CUTS[model], "seed": seed, "updates": 5 if model == "tiny" else 0}
    )
    spec = TrialSpec(experiment="tokenizers", name=f"{model}-seed{seed}", arm=model, settings=settings)
    return make_record(spec, figures=figures(seed, cost, lead), series=series(ratio))


def records(*, smol: dict[str, float] | None = None, **tiny: float) -> list[Record]:
    return [
        *(record("tiny", seed, **tiny) for seed in range(5)),
        *(record("smol", seed, **(tiny if smol is None else smol)) for seed in range(3)),
    ]


def verdict(found: list[Record]) -> Verdict:
    return judge(tokenizers.EXPERIMENT, CLAIM, "cpu", "cpu", found, len(found))


def test_it_is_supported_where_foreign_tokenizers_are_dear_and_the_own_as_foreign_refutes() -> None:
    found = verdict(records())
    assert found.verdict == "supported"
    assert found.effect == pytest.approx(3.002)
    assert found.n == 5
    assert "tiny: a retrained tokenizer costs 3.002" in found.because
    assert "smol: a permuted tokenizer costs" in found.because
    assert ", a borrowed tokenizer costs" in found.because
    assert "after 5 updates with new embeddings the own leads by 1.002" in found.because
    assert "Korean takes 8 times the tokens per character (7.92 to 8.08 in 2 paragraphs of one page)" in found.because
    assert "4.0 times for the same page" in found.because
    assert "the own tokenizer presented as foreign: refuted" in found.control


def test_it_can_be_refuted_and_the_other_control_supports() -> None:
    found = verdict(records(cost=0.0, lead=0.0, ratio=1.0))
    assert found.verdict == "refuted"
    assert "foreign tokenizers that are dear: supported" in found.control


@pytest.mark.parametrize(
    ("tiny", "smol"),
    [
        ({"cost": COST - 0.1}, {}),
        ({"lead": LEAD - 0.05}, {}),
        ({"ratio": RATIO * 0.5}, {}),
        ({}, {"cost": COST - 0.1}),
    ],
)
def test_each_part_that_fails_makes_it_conditional(tiny: dict[str, float], smol: dict[str, float]) -> None:
    assert verdict(records(smol=smol, **tiny)).verdict == "conditional"


def test_another_s_cut_of_the_text_is_judged_where_no_text_makes_a_tokenizer_of_that_size() -> None:
    cheap = [
        make_record(r.spec, figures=r.figures | {"borrowed_english_bits_per_byte": 1.1}, series=r.series)
        if r.spec.arm == "smol"
        else r
        for r in records()
    ]
    assert verdict(cheap).verdict == "conditional"


def test_one_paragraph_under_the_ratio_leaves_korean_undecided() -> None:
    assert verdict(records(ratio=RATIO)).verdict == "inconclusive"


def test_thresholds_lie_where_they_are_said_to_lie() -> None:
    above = {"cost": COST + 0.1, "lead": LEAD + 0.05, "ratio": RATIO * 1.2}
    assert verdict(records(smol=above, **above)).verdict == "supported"


def test_one_seed_decides_nothing() -> None:
    assert tokenizers.judge(Evidence([record("tiny", 0)])).verdict == "inconclusive"


def test_without_any_model_there_is_no_verdict() -> None:
    assert verdict([]).verdict == "not run"
    with pytest.raises(ValueError, match="no model has been read with a foreign tokenizer"):
        tokenizers.judge(Evidence([]))


def test_the_plots_show_every_tokenizer_and_language() -> None:
    evidence = Evidence(records())
    assert len(tokenizers.cost_lines(evidence)) == 7
    lines = tokenizers.language_lines(evidence)
    assert list(lines) == ["tiny, english", "tiny, korean", "smol, english", "smol, korean"]
    assert lines["smol, english"].y == [0.25, 0.25]


def test_each_model_is_planned_with_its_own_foreign_tokenizer() -> None:
    assert set(FOREIGN) == set(KNOWN) == set(CUTS)
    params = Params(models={"smol": ModelParams(seeds=2, cuts=("own", "permuted"), paragraphs=1)})
    sizes = {"train": 1, "validation": 1, "test": 1}
    profile = Profile.model_validate({"device": "cpu", "threads": 2, "tiny": {}, "data": sizes})
    specs = tokenizers.trials(params, profile)
    assert [spec.name for spec in specs] == ["smol-seed0", "smol-seed1"]
    assert specs[0].models() == {"smol"}
    assert specs[0].tasks() == []

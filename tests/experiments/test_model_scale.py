"""The judge of smaller models, on made-up records: what is kept, for how many bytes, and each control."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import model_scale
from experiments.model_scale import BYTES, EXPERIMENT, KEEP, family, step
from experiments.model_size import EXPERIMENT as MODEL_SIZE
from lab.claims import Evidence, MissingEvidence, judge
from lab.errors import LabError
from lab.params import load_params
from lab.records import Record
from lab.specs import Scaling, Simulation, Sweep, TrialSpec
from tests.conftest import ROOT
from tests.test_records import make_record

CLAIM = EXPERIMENT.claims[0]
SIZES = {"large": 900, "middle": 300, "small": 100}
SEEDS = 3


def record(
    size: str, seed: int, text: float, facts: float, task: float, rate: float = 1e-2, **changes: float
) -> Record:
    """A model that has learnt these shares of what the family's largest has: 2 bits, 80 % of the facts, 3 nats."""
    settings = Scaling(
        recipe={}, task="keepers_log", tuning_rates=(0.01,), tuning_updates=1, seed=seed, learning_rate=rate
    )
    spec = TrialSpec(experiment="model_scale", name=f"{size}-seed{seed}-lr{rate:g}", arm=size, settings=settings)
    apart = 1 + 0.01 * (seed - 1)  # draws of a seed, the same for every size
    figures: dict[str, float | None] = {
        "parameters_total": SIZES[size],
        "held_bytes": 16 * SIZES[size],
        "peak_bytes": 16 * SIZES[size] + 2000,
        "blind_bits_per_byte": 2.5,
        "general_bits_per_byte": 2.5 - 2 * text * apart,
        "blind_recall": 0.1,
        "recall": 0.1 + 0.8 * facts * apart,
        "blind_loss": 4.0,
        "test_loss": 4.0 - 3 * task * apart,
        "test_accuracy": 0.5,
        "tuning_rate": 0.01,
        "validation_loss": 1.0,
    }
    return make_record(spec, figures={**figures, **changes}, tags={"data_order": f"seed {seed}"})


def records(middle: tuple[float, float, float], small: tuple[float, float, float], seeds: int = SEEDS) -> list[Record]:
    shares = {"large": (1.0, 1.0, 1.0), "middle": middle, "small": small}
    return [record(size, seed, *kept) for size, kept in shares.items() for seed in range(seeds)]


def verdict(found: list[Record]) -> Any:
    return judge(EXPERIMENT, CLAIM, "cpu", "cpu", found, len(found))


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """What a trial leaves; those of `model_size`, which are read too, leave nothing of this kind."""
    settings = spec.settings
    if not isinstance(settings, Scaling):
        return {}
    size = float(settings.recipe["hidden_size"])
    return {
        **{f"{name}_bytes": 1000 * size for name in ("weights", "held", "steady", "peak")},
        "parameters_total": 100 * size,
        "vocabulary": 1000.0,
        "tokens": 1000.0,
        "validation_loss": 1.0,
        "general_bits_per_byte": 0.5,
        "blind_bits_per_byte": 2.0,
        "recall": 0.9,
        "blind_recall": 0.1,
        "task_validation_loss": 1.0,
        "tuning_rate": 0.003,
        "test_loss": 1.0,
        "test_accuracy": 0.5,
        "blind_loss": 4.0,
        "pretraining_loss": [7.0, 1.0],
        "tuning_validation_loss": [1.0],
    }


GOOD, LITTLE = (0.97, 0.95, 0.96), (0.5, 0.2, 0.4)


def test_it_is_supported_where_each_step_keeps_enough_in_every_quality() -> None:
    found = verdict(records(GOOD, tuple(0.95 * share for share in GOOD)))  # type: ignore[arg-type]
    assert found.verdict == "supported"
    assert found.effect == pytest.approx(95, abs=0.1)
    assert found.unit == "% of a quality kept, where least"
    assert "large to middle: keeps text 97 [" in found.because
    assert "for 33% of the bytes held and 41% of the peak" in found.because
    said = "smaller models that keep a tenth: refuted, smaller models that keep all: supported, "
    assert found.control == said + "smaller models with the bytes of the largest: refuted"


def test_it_is_refuted_where_no_step_does() -> None:
    assert verdict(records((0.7, 0.6, 0.8), (0.3, 0.2, 0.4))).verdict == "refuted"


def test_it_is_conditional_where_one_step_is_fair_and_the_next_is_not_and_says_which() -> None:
    found = verdict(records(GOOD, LITTLE))
    assert found.verdict == "conditional"
    opening = "fair are large to middle in text, large to middle in facts, large to middle in task; "
    assert found.because.startswith(opening)
    assert found.effect == pytest.approx(100 * 0.2 / 0.95, abs=0.5)


def test_it_is_conditional_where_one_quality_is_kept_and_another_lost() -> None:
    found = verdict(records((0.97, 0.3, 0.96), (0.95, 0.1, 0.94)))
    assert found.verdict == "conditional"
    assert "in facts" not in found.because.split(";")[0]


def test_it_tells_which_step_is_fair_in_which_quality_by_the_sizes() -> None:
    assert verdict(records(GOOD, LITTLE)).flips == (
        "fair from 900 to 300 parameters in text and facts and task; not fair from 300 to 100 parameters in text and facts and "
        "task"
    )
    assert verdict(records(GOOD, tuple(0.95 * share for share in GOOD))).flips == ""  # type: ignore[arg-type]
    assert verdict(records((0.7, 0.6, 0.8), (0.3, 0.2, 0.4))).flips == ""
    assert verdict(records(GOOD, GOOD, seeds=1)).flips == ""
    # A task that decides nothing is told, and what is decided beside it.
    assert verdict(tuned("small", 0.03)).flips == (
        "fair from 900 to 300 parameters in text and facts and task, from 300 to 100 parameters in text and facts; undecided "
        "from 300 to 100 parameters in task"
    )


def test_its_scope_says_where_what_fits_at_real_scale_is_to_be_found() -> None:
    assert "what fits where at real scale: `lab fit` and model-size-limit" in CLAIM.scope
    assert "model-size-limit" in {claim.id for claim in MODEL_SIZE.claims}


def test_what_the_seeds_do_not_decide_is_inconclusive() -> None:
    assert verdict(records(GOOD, GOOD, seeds=1)).verdict == "inconclusive"
    spread = records(GOOD, GOOD)
    spread[3] = record("middle", 0, 0.6, 0.95, 0.96)
    assert verdict(spread).verdict == "inconclusive"


@pytest.mark.parametrize(("kept", "answer"), [(KEEP + 0.001, "yes"), (KEEP - 0.001, "no")])
def test_a_step_is_fair_from_the_threshold_on(kept: float, answer: str) -> None:
    members = {
        size: {seed: record(size, seed, share, share, share, blind_recall=0.0) for seed in range(SEEDS)}
        for size, share in (("large", 1.0), ("middle", kept))
    }
    # The seeds differ by a factor that both sizes share: what is kept differs by a thousandth of it.
    one, other = members.items()
    found = step(one, other)
    assert found.bytes_share == pytest.approx(1 / 3)
    assert found.kept["text"].estimate == pytest.approx(kept)
    answers = found.answers()
    assert answers["text"] == answer or found.kept["text"].low < KEEP < found.kept["text"].high


def test_a_model_that_takes_more_than_half_of_the_bytes_is_no_compromise() -> None:
    found = records(GOOD, LITTLE)
    heavy = [
        r.model_copy(update={"figures": {**r.figures, "held_bytes": 16 * 900 * (BYTES + 0.01)}})
        if r.spec.arm == "middle"
        else r
        for r in found
    ]
    first = step(*list(family(Evidence(heavy)).items())[:2])
    assert set(first.answers().values()) == {"no"}
    assert verdict(heavy).verdict == "refuted"


def test_what_the_larger_model_has_not_learnt_cannot_be_kept() -> None:
    blind = [
        r.model_copy(update={"figures": {**r.figures, "recall": 0.1 + 0.001 * (r.setting("seed") - 1)}})
        for r in records(GOOD, LITTLE)
    ]
    found = step(*list(family(Evidence(blind)).items())[:2])
    assert found.answers()["facts"] == "undecided"
    assert "facts not learnt by large" in str(found)
    nothing = [
        r.model_copy(update={"figures": {**r.figures, "general_bits_per_byte": 2.5, "test_loss": 4.0}}) for r in blind
    ]
    assert verdict(nothing).because == "the larger models have learnt nothing that could be kept"


def test_sizes_are_told_by_their_parameters_and_rates_by_the_validation_loss() -> None:
    worse = [record("middle", seed, 0.1, 0.1, 0.1, rate=3e-2, validation_loss=2.0) for seed in range(SEEDS)]
    found = family(Evidence([*worse, *reversed(records(GOOD, LITTLE))]))
    assert list(found) == ["large", "middle", "small"]
    assert found["middle"][0].setting("learning_rate") == 1e-2
    assert "rate 0.01 (at the edge of its grid)" in verdict([*worse, *records(GOOD, LITTLE)]).because


def tuned(size: str, rate: float) -> list[Record]:
    """Evidence in which every size tries three rates of tuning, and one has its best at this."""
    found = []
    for r in records(GOOD, tuple(0.95 * share for share in GOOD)):  # type: ignore[arg-type]
        settings = r.spec.settings.model_copy(update={"tuning_rates": (0.003, 0.01, 0.03)})
        figures = {**r.figures, "tuning_rate": rate if r.spec.arm == size else 0.01}
        found.append(
            r.model_copy(update={"spec": r.spec.model_copy(update={"settings": settings}), "figures": figures})
        )
    return found


@pytest.mark.parametrize("rate", [0.003, 0.03])
def test_a_task_that_is_tuned_best_at_the_edge_of_its_rates_is_undecided_and_says_so(rate: float) -> None:
    assert verdict(tuned("small", 0.01)).verdict == "supported"
    found = verdict(tuned("small", rate))
    assert found.verdict == "inconclusive"
    assert found.because.count("(undecided: tuning of small is best at the edge of its grid)") == 1
    # The controls say what they say whatever rate was best.
    for name, answer in (
        ("smaller models that keep a tenth", "refuted"),
        ("smaller models that keep all", "supported"),
    ):
        assert model_scale.judge(CLAIM.controls[name].change(Evidence(tuned("small", rate)))).verdict == answer


def test_sizes_that_answer_nothing_right_are_told() -> None:
    none = [r.model_copy(update={"figures": {**r.figures, "test_accuracy": 0.0}}) for r in records(GOOD, LITTLE)]
    assert "no size answers a question of the task right" in verdict(none).because
    assert "no size answers" not in verdict(records(GOOD, LITTLE)).because


def test_what_trains_at_real_scale_is_told_where_it_was_measured() -> None:
    real = []
    for arm in ("trained-full", "trained-lora", "trained-qlora"):
        spec = TrialSpec(experiment="model_size", name=arm, arm=arm, tier="sim", settings=Simulation(model="gpt2"))
        real.append(make_record(spec, figures={"parameters_base": 5e8, "peak_bytes": 10 * 2**30}))
    said = model_scale.judge(Evidence([*records(GOOD, LITTLE), *real])).because
    assert "at real scale the largest that trains, full: none on 8 GB, 0.5B on 16 GB" in said
    assert "real scale" not in model_scale.judge(Evidence(records(GOOD, LITTLE))).because


def test_sizes_that_read_other_tokens_are_no_pair() -> None:
    found = records(GOOD, LITTLE)
    found[0] = found[0].model_copy(update={"tags": {"data_order": "other"}})
    members = list(family(Evidence(found)).items())
    with pytest.raises(LabError, match=r"large and middle of seed 0 read other tokens\. Run: lab run model_scale"):
        step(*members[:2])
    assert verdict(found).verdict == "inconclusive"


def test_one_size_alone_is_no_family() -> None:
    alone = [r for r in records(GOOD, LITTLE) if r.spec.arm == "large"]
    assert verdict(alone).because == "fewer than two sizes were measured"


def test_the_plots_show_the_family_or_the_real_models() -> None:
    found = Evidence(records(GOOD, LITTLE))
    lines = model_scale.quality_lines(found)
    assert list(lines) == ["text", "facts", "task"]
    assert lines["text"].y == pytest.approx([100, 97, 50])
    assert list(model_scale.byte_lines(found)) == ["held", "peak"]
    real = []
    for arm in ("trained-full", "trained-lora"):
        for model, size in (("qwen2.5-0.5b", 5e8), ("llama-3.2-1b", 1.2e9)):
            spec = TrialSpec(
                experiment="model_size", name=f"{arm}-{model}", arm=arm, tier="sim", settings=Simulation(model=model)
            )
            real.append(make_record(spec, figures={"parameters_base": size, "peak_bytes": 10 * size}))
    drawn = model_scale.byte_lines(Evidence(real))
    assert list(drawn) == ["full fine-tuning", "LoRA"]
    assert list(drawn["LoRA"].x) == [5e8, 1.2e9]


@pytest.mark.parametrize("name", ["cpu", "full", "gpu"])
def test_every_size_reads_the_same_text_and_tries_the_same_rates(name: str) -> None:
    plan = EXPERIMENT.plan(load_params(ROOT / "params.yaml").profiles[name], "here")
    assert len(plan) == 3
    assert all(isinstance(item, Sweep) for item in plan)
    sweeps = [item for item in plan if isinstance(item, Sweep)]
    assert len({item.rates for item in sweeps}) == 1
    shape = {"hidden_size", "layers", "heads", "key_value_heads", "intermediate_size"}
    texts = [{k: v for k, v in _scaling(item).recipe.items() if k not in shape} for item in sweeps]
    assert texts[0] == texts[1] == texts[2]
    assert len({_scaling(item).tuning_rates for item in sweeps}) == 1
    assert all(len(item.then) >= 3 for item in sweeps)


def _scaling(item: Sweep) -> Scaling:
    settings = item.then[0].settings
    assert isinstance(settings, Scaling)
    return settings


def test_a_slip_in_a_size_or_its_text_shows_before_anything_is_run() -> None:
    profile = load_params(ROOT / "params.yaml").profiles["cpu"]
    section = profile.experiments()["model_scale"]
    slip = profile.model_copy(update={"model_scale": {**section, "text": {"poeple": 3}}})
    with pytest.raises(LabError, match=r"model_scale: large: poeple is not a known key\. Did you mean 'people'\?"):
        EXPERIMENT.plan(slip, "here")


def test_without_a_trained_size_there_is_no_line_of_quality() -> None:
    with pytest.raises(MissingEvidence, match="no size was trained"):
        model_scale.quality_lines(Evidence([]))

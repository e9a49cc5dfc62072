"""params.yaml: what it takes, and the one line that each mistake in it gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from lab.errors import LabError, nearest, unknown
from lab.params import Count, Params, Rate, Section, load_params, parse
from lab.study import Study
from tests.conftest import ROOT


class Inner(Section):
    learning_rate: Rate
    seeds: Count


class Outer(Section):
    task: str
    methods: dict[str, Inner]
    second: Inner | None = None


GOOD: dict[str, Any] = {"task": "gcd", "methods": {"lora": {"learning_rate": 1e-3, "seeds": 3}}}


def with_value(path: str, value: Any) -> dict[str, Any]:
    """GOOD with another value at a dotted path."""
    changed = yaml.safe_load(yaml.safe_dump(GOOD))
    *sections, key = path.split(".")
    place = changed
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    return changed


def said(raw: Any, kind: type[Section] = Outer) -> str:
    """The line that a mistake gets."""
    with pytest.raises(LabError) as caught:
        parse(kind, raw, "params.yaml: profiles.cpu.mine")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("params.yaml: profiles.cpu.mine: ")
    return text.removeprefix("params.yaml: profiles.cpu.mine: ")


@given(st.integers(1, 10**9), st.floats(1e-12, 99, allow_nan=False))
def test_counts_and_rates_in_range_are_taken_as_they_are(seeds: int, rate: float) -> None:
    inner = parse(Inner, {"learning_rate": rate, "seeds": seeds}, "here")
    assert (inner.seeds, inner.learning_rate) == (seeds, rate)


@given(st.integers(max_value=0))
def test_no_count_below_one_is_taken(seeds: int) -> None:
    text = said(with_value("methods.lora.seeds", seeds))
    assert text == f"methods.lora.seeds is {seeds}; it must be at least 1. Raise it."


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("methods.lora.seeds", True, "methods.lora.seeds is True; it must be a number, not true or false."),
        ("methods.lora.seeds", "three", "methods.lora.seeds is 'three'; it must be a valid integer"),
        ("methods.lora.seeds", 2.5, "methods.lora.seeds is 2.5; it must be a valid integer"),
        ("methods.lora.seeds", None, "methods.lora.seeds is None; it must be a valid integer"),
        ("methods.lora.learning_rate", "fast", "methods.lora.learning_rate is 'fast'; it must be a valid number"),
        ("methods.lora.learning_rate", float("nan"), "methods.lora.learning_rate is nan; it must be greater than 0."),
        ("methods.lora.learning_rate", 0, "methods.lora.learning_rate is 0; it must be greater than 0. Raise it."),
        ("methods.lora.learning_rate", -1e-3, "methods.lora.learning_rate is -0.001; it must be greater than 0."),
        ("methods.lora.learning_rate", 100, "methods.lora.learning_rate is 100; it must be less than 100. Correct it."),
        ("methods.lora.learning_rate", True, "methods.lora.learning_rate is True; it must be a number"),
        ("task", 3, "task is 3; it must be a valid string. Correct it."),
        ("methods", ["lora"], "methods is ['lora']; it must be a mapping of keys."),
        ("second", "lora", "second is 'lora'; it must be a mapping of keys."),
        ("tasks", "gcd", "tasks is not a known key. Did you mean 'task'?"),
        ("zzz", 1, "zzz is not a known key. Known: methods, second, task."),
        ("methods.lora.seed", 3, "methods.lora.seed is not a known key. Did you mean 'seeds'?"),
    ],
)
def test_a_mistake_names_the_key_its_value_and_the_limit(path: str, value: Any, text: str) -> None:
    assert said(with_value(path, value)).startswith(text)


def test_a_slip_in_a_needed_key_names_the_slip_and_not_only_what_is_missing() -> None:
    raw = {"task": "gcd", "methods": {"lora": {"learning_rat": 1e-3, "seeds": 3}}}
    assert said(raw) == "methods.lora.learning_rat is not a known key. Did you mean 'learning_rate'?"
    assert said({"task": "gcd"}) == "methods is missing. Add it; `git diff params.yaml` shows what changed."


def test_a_rate_that_yaml_takes_for_text_is_still_a_number() -> None:
    # YAML 1.1 wants a dot in 1e-3; people leave it out.
    assert yaml.safe_load("1e-3") == "1e-3"
    assert parse(Inner, {"learning_rate": "1e-3", "seeds": 1}, "here").learning_rate == 1e-3


class Recipe(Section):
    width: Count
    heads: Count = 4
    rates: tuple[Rate, ...] = Field(default=(1e-3,), min_length=1)

    @model_validator(mode="after")
    def _divides(self) -> Recipe:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


def test_values_that_do_not_fit_together_are_both_named() -> None:
    assert said({"width": 6}, Recipe) == "width 6 must be a multiple of heads 4. Correct one of them."
    assert said({"width": 8, "rates": []}, Recipe) == "rates is []; it must have at least 1 entry. Add one."
    assert said({"width": 8, "rates": [1e-3, "fast"]}, Recipe).startswith(
        "rates.1 is 'fast'; it must be a valid number"
    )


def test_sections_cannot_be_changed_afterwards() -> None:
    inner = Inner(learning_rate=1e-3, seeds=1)
    with pytest.raises(ValidationError):
        inner.seeds = 2  # type: ignore[misc]


def test_the_nearest_known_name_is_offered_and_none_that_is_far_off() -> None:
    assert nearest("lroa", ["full", "lora"]) == "lora"
    assert nearest("xyzzy", ["full", "lora"]) is None
    assert str(unknown("method", "xyzzy", ["lora", "full"])) == "unknown method 'xyzzy'. Known: full, lora."


# The file -------------------------------------------------------------------------------------------------------


def file_with(folder: Path, text: str | bytes) -> Path:
    path = folder / "params.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_the_file_of_the_project_is_right_under_every_profile() -> None:
    params = load_params(ROOT / "params.yaml")
    for name in params.profiles:
        Study.load(name, ROOT).check_names()
    assert params.select() is params.profiles[params.profile]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("profile: [\n", r"params\.yaml is not YAML \(line 2, column 1\): .*\. Correct that line\."),
        (
            "a: b: c\n",
            r"params\.yaml is not YAML \(line 1, column 5\): mapping values are not allowed in this context\.",
        ),
        ("\tprofile: cpu\n", r"params\.yaml is not YAML \(line 1, column 1\): "),
        (b"profile: \xff\xfe\n", r"params\.yaml is not YAML: .*Correct that line"),
        ("- cpu\n", r"params\.yaml holds list, not a mapping of keys\. Restore it: git checkout params\.yaml"),
        ("", r"params\.yaml holds NoneType, not a mapping"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_says_where(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(LabError, match=said) as caught:
        load_params(file_with(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=rf"params\.yaml is missing in {re.escape(str(tmp_path))}\. Restore it: git"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("profile: ", "profile: smok # ", r"params\.yaml: unknown profile 'smok'\. Did you mean 'smoke'\? Known: "),
        ("models:", "model:", r"params\.yaml: model is not a known key\. Did you mean 'models'\?"),
        (
            "  source: embedded ",
            "  source: wheel ",
            r"params\.yaml: models\.source is 'wheel'; it must be 'embedded' or",
        ),
        (
            "    device: cpu",
            "    device: tpu",
            r"params\.yaml: profiles\.smoke\.device is 'tpu'; it must be 'cpu' or 'cuda'",
        ),
        (
            "    threads: ",
            "    thread: ",
            r"params\.yaml: profiles\.smoke\.thread is not a known key\. Did you mean 'threads'",
        ),
        ("    threads: ", "    threads: 0 # ", r"params\.yaml: profiles\.smoke\.threads is 0; it must be at least 1"),
    ],
)
def test_a_mistake_in_the_file_of_the_project_is_one_line(tmp_path: Path, before: str, after: str, said: str) -> None:
    text = (ROOT / "params.yaml").read_text()
    # Profiles may come in any order: the first with a line is meant, whatever it is called.
    changed = re.sub(rf"(?m)^{re.escape(before)}", after, text, count=1)
    assert changed != text
    first = next(iter(yaml.safe_load(text)["profiles"]))
    with pytest.raises(LabError, match=said.replace("smoke\\.", f"{first}\\.")) as caught:
        load_params(file_with(tmp_path, changed))
    assert "\n" not in str(caught.value)


def test_a_profile_keeps_the_sections_of_the_experiments_for_them() -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    params = parse(Params, raw, "params.yaml")
    names = set(raw["profiles"]["smoke"]) - {"device", "threads", "tiny", "data"}
    assert set(params.profiles["smoke"].experiments()) == names

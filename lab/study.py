"""A study: the experiments of a folder under one profile, from plan to verdicts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import device, records
from lab.claims import Evidence, Experiment, Registry, Tier, Verdict, discover, in_tier, judge
from lab.device import Card
from lab.errors import LabError
from lab.origin import shape_fingerprint
from lab.params import Params, Profile, load_params
from lab.plots import Plot
from lab.records import Record
from lab.specs import Plan, Setup, Sweep, Training, TrialSpec, templates
from lab.sweeps import expand
from lab.workspace import Workspace

if TYPE_CHECKING:
    from lab.forecast import Forecast


OTHER_CODE = "was measured with other code"
"""Of a record that is as planned, but for what has changed in the code of its kind of trial since."""


@dataclass(frozen=True)
class Study:
    """What params.yaml says under a profile, and the claims of this folder."""

    params: Params
    registry: Registry
    workspace: Workspace

    @classmethod
    def load(cls, profile: str | None = None, root: Path | None = None) -> Study:
        """Read params.yaml of the folder (the current one) and the experiments beside it, and check both.

        Raises:
            LabError: a mistake in either.
        """
        root = root or Path.cwd()
        if str(root.resolve()) not in sys.path:
            sys.path.insert(0, str(root.resolve()))
        params = load_params(root / "params.yaml")
        name, device = _with_device(profile or params.profile, params, root / "results")
        params.select(name)
        registry = discover()
        for each in params.profiles:
            registry.check_profile(params.profiles[each], f"params.yaml: profiles.{each}")
        for each in params.bundle.order:
            registry.experiment(each)
        return cls(params, registry, Workspace(root, name, device=device))

    @property
    def profile(self) -> Profile:
        """The settings of the chosen profile."""
        return self.params.select(self.workspace.profile)

    @property
    def tier(self) -> Tier:
        """Where the profile's evidence comes from."""
        return "gpu" if self.profile.device == "cuda" else "cpu"

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """That of the device, and the simulated one, which needs no GPU elsewhere."""
        return (self.tier,) if self.workspace.device else (self.tier, "sim")

    def require_device(self) -> Card | None:
        """The profile's device is there, and nobody else's: the card of a CUDA profile, None of one for the processor.

        Raises:
            LabError: a CUDA profile without a CUDA GPU, or others hold memory on it.
        """
        if self.profile.device != "cuda":
            return None
        import torch

        if not torch.cuda.is_available():
            build = f"torch {torch.__version__}"
            raise LabError(
                f"profile '{self.workspace.profile}' needs a CUDA GPU; {build} finds none. "
                "Choose --profile cpu, or install a CUDA build of torch on a machine with a GPU."
            )
        limit = device.limit_gib()
        card = device.card_here()
        device.require_free(card)
        return card.limited(limit)

    def forecast(self, card: Card) -> Forecast:
        """What the trials of the profile ask of a card.

        Raises:
            LabError: the profile runs on the processor.
        """
        from lab.forecast import Forecast

        if self.profile.device != "cuda":
            raise LabError(
                f"profile '{self.workspace.profile}' runs on the processor, so that no card has to hold it. "
                "Choose one for a CUDA GPU: --profile gpu"
            )
        return Forecast(card, self.workspace, self.profile)

    # Plan -------------------------------------------------------------------------------------------------------

    def plan(self, experiment: Experiment) -> Plan:
        """What an experiment wants under the profile."""
        return experiment.plan(self.profile, f"params.yaml: profiles.{self.workspace.profile}")

    def planned(self, experiment: Experiment) -> list[TrialSpec]:
        """The trials of an experiment, as far as the records of its sweeps decide."""
        return self._decided(experiment, self.evidence(experiment.name)[0])

    def _decided(self, experiment: Experiment, found: list[Record]) -> list[TrialSpec]:
        return expand(self.plan(experiment), found)

    def check_names(self) -> None:
        """Every model, method and task that the profile's trials name is known, and the recipe of `tiny` is right.

        Needs no heavy import, so that a mistake in params.yaml shows at once, before anything is run.

        Raises:
            LabError: one is not; the message names the nearest that is.
        """
        from lab.base_models import tiny_recipe
        from lab.corpus import task_examples
        from lab.methods import method
        from lab.models import check_model
        from lab.params import parse

        tiny_recipe(self.profile, self.workspace)
        for settings in self._settings():
            check_model(settings.model)
            parse(method(settings.method).options, settings.method_options, f"method {settings.method}")
        if self.params.data.source == "embedded":
            for task in self.tasks():
                task_examples(task, "test", 1, 0)

    def write_plans(self) -> None:
        """Write the specs of each experiment: what a training stage depends on instead of the experiment's file.

        Raises:
            LabError: a trial names something unknown; then no plan is written.
        """
        from lab.optimizers import check_optimizer

        self.check_names()
        for settings in self._settings():
            check_optimizer(settings.optimizer)
        for experiment in self.registry.experiments.values():
            rows = [item.model_dump(mode="json") for item in self.plan(experiment)]
            records.write_text(self.workspace.plan(experiment.name), json.dumps(rows, indent=1, sort_keys=True) + "\n")

    def read_plan(self, name: str) -> Plan:
        """What the plan stage wrote."""
        path = self.workspace.plan(name)
        if not path.is_file():
            raise LabError(f"{path} is missing. Run: dvc repro plan")
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [(Sweep if row.get("kind") == "sweep" else TrialSpec).model_validate(row) for row in rows]

    def tasks(self) -> list[str]:
        """The tasks that the profile's trials read."""
        return sorted({task for spec in self._templates() for task in spec.tasks()})

    def _templates(self) -> Iterator[TrialSpec]:
        for experiment in self.registry.experiments.values():
            yield from templates(self.plan(experiment))

    def _settings(self) -> Iterator[Training | Setup]:
        for spec in self._templates():
            yield from spec.runs

    # Judge ------------------------------------------------------------------------------------------------------

    def evidence(self, experiment: str) -> tuple[list[Record], list[Path]]:
        """The records of an experiment under the profile, and the paths of damaged ones."""
        return records.read_records(self.workspace.results / experiment)

    def all_evidence(self, experiment: Experiment) -> list[Record]:
        """The records that the judges of an experiment see: its own, and those of the experiments that it reads."""
        return [record for name in (experiment.name, *experiment.reads) for record in self.evidence(name)[0]]

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """The verdict of every claim under the profile, computed from the records; in the sim tier if it plans that."""
        found = []
        for experiment in self.registry.experiments.values():
            specs, kept = [], []
            for read in (experiment, *map(self.registry.experiment, experiment.reads)):
                found_there = self.evidence(read.name)[0]
                wanted = self._decided(read, found_there)
                names = {spec.name for spec in wanted}
                specs += wanted
                kept += [record for record in found_there if record.spec.name in names]
            if not any(record.spec.experiment == experiment.name for record in kept):
                kept = []  # what it reads of others is no evidence by itself
            planned = Counter[Tier](spec.tier or self.tier for spec in specs)
            for claim, tier in product(experiment.claims, self.tiers):
                if tier in claim.tiers and (planned[tier] or tier != "sim"):
                    found.append(judge(experiment, claim, self.workspace.label, tier, kept, planned[tier]))
            # What only a GPU can show is not left out of a profile without one: it says that it was not run.
            found += [
                judge(experiment, claim, self.workspace.label, "gpu", [], 0)
                for claim in experiment.claims
                if claim.tiers == ("gpu",) and self.tier != "gpu"
            ]
        return found

    def stale(self, experiment: Experiment) -> list[str]:
        """Why the committed records of an experiment do not answer today's plan and code ([] if they do)."""
        found, damaged = self.evidence(experiment.name)
        by_name = {record.spec.name: record for record in found}
        reasons = [f"{path.name} is damaged" for path in damaged]
        for spec in self._decided(experiment, found):
            record = by_name.get(spec.name)
            if record is None:
                if not self.workspace.device:  # a lent GPU may not have come to the end
                    reasons.append(f"{spec.name} is missing")
            elif record.spec != spec:
                reasons.append(f"{spec.name} was measured with other settings")
            elif record.provenance.code != records.code_fingerprint(
                self.workspace.root, spec.settings.kind, spec.methods()
            ):
                reasons.append(f"{spec.name} {OTHER_CODE}")
            elif any(shape_fingerprint(m) not in (None, record.provenance.inputs.get(m)) for m in spec.models()):
                reasons.append(f"{spec.name} was measured on another shape")
        return reasons

    def has_other_code(self, experiment: Experiment) -> bool:
        """Whether records of an experiment are as planned but for code that has changed since; `lab study` measures them again."""
        return any(reason.endswith(OTHER_CODE) for reason in self.stale(experiment))

    def by_other_code(self) -> list[str]:
        """The experiments that have such records."""
        return [name for name, experiment in self.registry.experiments.items() if self.has_other_code(experiment)]

    def planning(self, experiment: Experiment) -> list[str]:
        """The profiles that have a section for an experiment."""
        return [name for name, profile in self.params.profiles.items() if experiment.name in profile.experiments()]

    def plots(self, experiment: Experiment) -> list[Path]:
        """The plots of an experiment that have been drawn."""
        paths = [self._plot_path(plot, tier) for plot, tier in product(experiment.plots, self.tiers)]
        return [path for path in paths if path.is_file()]

    def _plot_path(self, plot: Plot, tier: Tier) -> Path:
        return self.workspace.results / "plots" / f"{plot.name}{'-sim' * (tier == 'sim')}.svg"

    def write_verdicts(self) -> None:
        """Write verdicts.json, the metrics for DVC, and the plots."""
        from lab.plots import draw

        folder = self.workspace.results
        rows = [dataclasses.asdict(verdict) for verdict in self.verdicts]
        records.write_text(folder / "verdicts.json", json.dumps(tidy(rows), indent=1) + "\n")
        metrics: dict[str, dict[str, Any]] = {}
        for v in self.verdicts:
            values = {"verdict": v.verdict, "effect": v.effect, "low": v.low, "high": v.high, "n": v.n}
            metrics.setdefault(v.claim, {})[v.tier] = values
        records.write_text(folder / "metrics.json", json.dumps(tidy(metrics), indent=1) + "\n")
        for experiment in self.registry.experiments.values():
            found = self.all_evidence(experiment)
            for plot, tier in product(experiment.plots, self.tiers):
                path = self._plot_path(plot, tier)
                if draw(plot, Evidence(in_tier(found, tier)), path) is None:
                    path.unlink(missing_ok=True)  # of records that are no longer there


def elsewhere(results: Path, params: Params) -> list[str]:
    """The folders below `results` with what another machine has measured of a profile: `gpu-h100`, `cpu-epyc`."""
    folders = (path.name for path in results.glob("*-*") if path.is_dir() and path.name not in params.profiles)
    return sorted(name for name in folders if name.partition("-")[0] in params.profiles)


def _with_device(name: str, params: Params, results: Path) -> tuple[str, str]:
    """The profile and the device of a name: `gpu-h100` is the profile `gpu` measured on an h100, where that was imported."""
    profile, _, device = name.partition("-")
    return (profile, device) if name in elsewhere(results, params) else (name, "")


def tidy(value: Any) -> Any:
    """The same value as strict JSON takes it: infinities and NaN become null."""
    if isinstance(value, dict):
        return {key: tidy(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Running the pipeline -------------------------------------------------------------------------------------------


def set_profile(path: Path, profile: str) -> str:
    """Name `profile` in params.yaml, leaving every other byte as it is; returns the text from before."""
    before = path.read_text(encoding="utf-8")
    after, count = re.subn(r"(?m)^profile:\s*\S+", f"profile: {profile}", before, count=1)
    if not count:
        raise LabError(
            f"{path.name}: no line 'profile: ...' at the start of a line. Restore it: git checkout {path.name}"
        )
    if after != before:
        records.write_text(path, after)
    return before


def reproduce(workspace: Workspace, experiments: Sequence[str] = ()) -> int:
    """`dvc repro` with the profile of the workspace; params.yaml is put back afterwards.

    The text from before lies in `.lab` meanwhile, so that a study which was killed is put right by the next one.

    Args:
        experiments: the ones to run, with what they need; then what is there is judged. None named: the whole pipeline.
    Returns:
        The exit code of dvc.
    """
    _drop_damaged_rwlock(workspace.root / ".dvc" / "tmp" / "rwlock")
    kept = workspace.lock("study").with_name("params.before.yaml")
    if kept.is_file():
        left = kept.read_text(encoding="utf-8")
        now = workspace.params.read_text(encoding="utf-8")
        if _without_profile(left) == _without_profile(now):
            records.write_text(workspace.params, left)
    records.write_text(kept, workspace.params.read_text(encoding="utf-8"))
    before = set_profile(workspace.params, workspace.profile)
    try:
        stages = [f"trials@{name}" for name in experiments]
        command = [sys.executable, "-m", "dvc", "repro", *stages]
        # The stages call `lab` by its name, which a shell need not know: that of this Python comes first.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        code = subprocess.run(command, cwd=workspace.root, env={**os.environ, "PATH": path}).returncode
        if stages and not code:  # the stage `verdicts` waits for all experiments
            judge_it = [sys.executable, "-m", "lab.cli", "judge", "--profile", workspace.profile]
            code = subprocess.run(judge_it, cwd=workspace.root).returncode
        return code
    finally:
        records.write_text(workspace.params, before)
        kept.unlink()


def _drop_damaged_rwlock(path: Path) -> None:
    """Remove the file of DVC's locks if it was cut off while it was written: DVC would refuse it for ever.

    The caller holds the lock of the study, so that no other `dvc repro` of the lab is under way.
    """
    if path.is_file():
        try:
            json.loads(path.read_bytes())
        except ValueError:
            path.unlink()


def _without_profile(text: str) -> str:
    return re.sub(r"(?m)^profile:.*$", "", text, count=1)

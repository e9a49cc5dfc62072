"""Where things lie in a study's folder. One place, so that no other module spells a path."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """The folders of a study under one profile. Nothing is created before something is written."""

    root: Path
    profile: str
    device: str = field(default="", kw_only=True)
    """The device whose imported records are meant, as in the folder `results/<profile>-<device>`; empty: measured here."""

    @property
    def label(self) -> str:
        """The profile, and the device where the records were imported."""
        return f"{self.profile}-{self.device}" if self.device else self.profile

    @property
    def params(self) -> Path:
        """The numbers that a person may want to change."""
        return self.root / "params.yaml"

    @property
    def build(self) -> Path:
        """What the prepare stages make; in the DVC cache, not in git."""
        return self.root / "build"

    @property
    def environment(self) -> Path:
        """What is installed, and the id of this installation."""
        return self.build / "environment.json"

    @property
    def downloads(self) -> Path:
        """Files that were downloaded, and that are checked by their hash before each use."""
        return self.build / "downloads"

    def plan(self, experiment: str) -> Path:
        """The trials that an experiment wants, as JSON."""
        return self.build / self.profile / "plan" / f"{experiment}.json"

    def model(self, name: str) -> Path:
        """A prepared model: `smol` is the same for every profile, `tiny` is not."""
        return self.build / "smol" if name == "smol" else self.build / self.profile / name

    @property
    def data(self) -> Path:
        """The prepared tasks."""
        return self.build / self.profile / "data"

    @property
    def scratch(self) -> Path:
        """Large files that a trial writes and removes; not in the DVC cache."""
        return self.build / self.profile / "scratch"

    @property
    def results(self) -> Path:
        """The records and verdicts of the profile; in git."""
        return self.root / "results" / self.label

    @property
    def tracking_uri(self) -> str:
        """MLflow's database, absolute, in the place where `mlflow ui` looks for it."""
        return f"sqlite:///{self.root.resolve() / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        """MLflow's artifacts."""
        return self.root.resolve() / "mlartifacts"

    def lock(self, name: str) -> Path:
        """Held by the study, or the stage, that runs in this folder."""
        return self.root / ".lab" / f"{name}.lock"

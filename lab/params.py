"""params.yaml: read, checked, and resolved for one profile.

Each experiment declares the type of its own section; this module knows the rest of the file. Every mistake becomes one
line that names the key, its value, the limit and the nearest known key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lab.errors import LabError, nearest, unknown


def _not_a_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


T = TypeVar("T", bound=BaseModel)
Count = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=1)]
Rate = Annotated[float, BeforeValidator(_not_a_bool), Field(gt=0, lt=100, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_not_a_bool), Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of params.yaml: immutable, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SmolSource(Section):
    """Where the embedded SmolLM2-135M-Instruct comes from, and what its bytes must be."""

    wheel: str
    wheel_sha256: str
    gguf_sha256: str
    hub: str
    revision: str


class ModelsSection(Section):
    """`source: embedded` takes the wheel; `source: hub` loads `hub` at `revision` with transformers."""

    source: Literal["embedded", "hub"]
    smol: SmolSource


class HubData(Section):
    """A data set on the hub with a prompt and an answer column; `test` may equal `train` (then it is split)."""

    name: str
    configuration: str | None = None
    revision: str
    prompt: str
    answer: str
    train: str = "train"
    test: str = "test"


class DataSection(Section):
    """`source: embedded` generates the task with reasoning-gym; `source: hub` loads `hub` with datasets."""

    source: Literal["embedded", "hub"]
    hub: HubData


class DataSizes(Section):
    """How many examples each split of a task has."""

    train: Count
    validation: Count
    test: Count


class Profile(BaseModel):
    """How big a study is. Sections beyond these belong to the experiments, which check them themselves."""

    model_config = ConfigDict(frozen=True, extra="allow")

    device: Literal["cpu", "cuda"]
    threads: Count
    tiny: dict[str, Any]
    data: DataSizes

    def experiments(self) -> dict[str, Any]:
        """The raw sections of the experiments, by name."""
        return dict(self.model_extra or {})


class BundleSection(Section):
    """What runs first where a GPU is lent for minutes."""

    order: tuple[str, ...] = ()
    """Experiments, the most valuable first; those that are not named come after them."""


class Params(Section):
    """The whole of params.yaml."""

    profile: str
    models: ModelsSection
    data: DataSection
    bundle: BundleSection = BundleSection()
    profiles: dict[str, Profile]

    def select(self, profile: str | None = None) -> Profile:
        """The settings of one profile (the file's own `profile` if none is named)."""
        name = profile or self.profile
        if name not in self.profiles:
            raise unknown("profile", name, self.profiles, "params.yaml: ")
        return self.profiles[name]


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        LabError: the file is missing, is not YAML, or holds a key or value that it must not.
    """
    import yaml

    if not path.is_file():
        raise LabError(f"{path.name} is missing in {path.parent.resolve()}. Restore it: git checkout {path.name}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C a tenth of the time: every command reads the file
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise LabError(f"{path.name} is not YAML{place}: {_first_line(error)}. Correct that line.") from None
    if not isinstance(raw, Mapping):
        raise LabError(
            f"{path.name} holds {type(raw).__name__}, not a mapping of keys. Restore it: git checkout {path.name}"
        )
    params = parse(Params, raw, path.name)
    params.select()
    return params


def parse(kind: type[T], raw: Any, where: str) -> T:
    """`raw` as `kind`; the first mistake as a LabError whose text starts with `where` and the key's path."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise LabError(_explain(kind, error, where)) from None


def _explain(kind: type[BaseModel], error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    value = first["input"]
    match first["type"]:
        case "extra_forbidden":
            key, known = str(first["loc"][-1]), _known_keys(kind, first["loc"][:-1])
            guess = nearest(key, known)
            hint = f"Did you mean '{guess}'?" if guess else f"Known: {', '.join(sorted(known)) or 'none'}."
            return f"{where}: {path} is not a known key. {hint}"
        case "missing":
            if slip := _slip(kind, first["loc"], value):
                place = ".".join(str(part) for part in (*first["loc"][:-1], slip))
                return f"{where}: {place} is not a known key. Did you mean '{first['loc'][-1]}'?"
            return f"{where}: {path} is missing. Add it; `git diff {where.split(':')[0]}` shows what changed."
        case "greater_than_equal":
            return f"{where}: {path} is {value!r}; it must be at least {first['ctx']['ge']}. Raise it."
        case "greater_than":
            return f"{where}: {path} is {value!r}; it must be greater than {first['ctx']['gt']}. Raise it."
        case "model_type" | "dict_type":
            return f"{where}: {path} is {value!r}; it must be a mapping of keys. `git diff {where.split(':')[0]}` shows it."
        case "literal_error":
            return f"{where}: {path} is {value!r}; it must be {first['ctx']['expected']}. Choose one of these."
        case "too_short":
            return f"{where}: {path} is {value!r}; it must have at least {first['ctx']['min_length']} entry. Add one."
        case "value_error" if not path:
            return f"{where}: {_reason(first['msg'])}. Correct one of them."
        case _:
            return f"{where}: {path} is {value!r}; it {_reason(first['msg'])}. Correct it."


def _reason(message: str) -> str:
    """pydantic's sentence without its opening: `must be a valid integer`."""
    text = message.removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    return text.replace("should be", "must be", 1)


def _slip(kind: type[BaseModel], path: tuple[Any, ...], section: Any) -> str | None:
    """The key of a section that was probably meant to be the missing one at `path`."""
    known = _known_keys(kind, path[:-1])
    strays = [str(key) for key in section if key not in known] if isinstance(section, Mapping) else []
    return nearest(str(path[-1]), strays)


def _known_keys(kind: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `path` inside `kind` takes."""
    fields = kind.model_fields
    for part in path:
        annotation = fields[part].annotation if part in fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            fields = annotation.model_fields
        elif part in fields:
            inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
            if inner:
                fields = inner[0].model_fields
    return list(fields)


def _first_line(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error)
    return str(problem).splitlines()[0].rstrip(".")

"""Configs: one TOML file per experiment, checked before anything runs.

    [model]                                 [data]                      [output]
    name = "torchvision:resnet50"           path = "imagenet/val"       path = "out/imagenet.h5"
    weights = "DEFAULT"

    [run]                                   methods = ["saliency", {name = "integrated_gradients", steps = 100}]
    target = "label"                        metrics = ["morf", "lerf"]

`methods` and `metrics` stand above the first table. `attrbox configs` prints all keys with their defaults.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails

from attrbox.core.atomic_files import as_path
from attrbox.core.options import choose
from attrbox.core.registry import Registry
from attrbox.core.renaming import renamed
from attrbox.data.models.loading import SHORTHANDS
from attrbox.errors import AttrboxError, FileError, OptionError, near_miss, shown
from attrbox.methods.base import method_registry
from attrbox.metrics.base import metric_registry
from attrbox.pipeline.settings import FORMERLY

Entry = str | dict[str, Any]
T = TypeVar("T")
NonEmpty = Annotated[list[T], Field(min_length=1)]


class _Table(BaseModel):
    """A table of the file: unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _current(cls, values: Any) -> Any:
        return renamed(values, FORMERLY, "config") if isinstance(values, Mapping) else values


class ModelConfig(_Table):
    """[model]: what is explained."""

    name: str = Field(
        default="efficientnet_lite0",
        description="torchvision:NAME, package.module:factory (needs --trust), a shorthand",
    )
    weights: str | None = Field(default=None, description="a file, a set of torchvision, DEFAULT, or none (random)")


class DataConfig(_Table):
    """[data]: on what."""

    path: str | NonEmpty[str] = Field(
        default="demo:photographs", description="a folder of images, files, or demo:photographs"
    )
    labels: str | None = Field(
        default=None, description="a CSV file, file and label (class name, WordNet id or number); default: folder names"
    )
    resize: int | None = Field(default=None, description="short side in pixels; default: the model's own preprocessing")
    crop: int | None = Field(default=None, description="side of the square cut out of the middle")
    mean: NonEmpty[float] | None = Field(
        default=None, description="of the normalization, per channel, of pixels from 0 to 1"
    )
    std: NonEmpty[float] | None = Field(default=None, description="of the normalization")


class OutputConfig(_Table):
    """[output]: where the maps go, and how."""

    path: str = Field(default="out/maps.h5", description="the HDF5 file")
    dtype: Literal["float32", "float16", "float64"] = Field(default="float32", description="of the maps")
    compression: Literal["none", "lzf", "gzip"] = Field(default="none", description="of the maps")
    channels: Literal["all", "one"] = Field(
        default="all", description="all: every channel; one: the channel-reduced map"
    )
    thumbnails: bool = Field(default=True, description="keep a small picture of each sample, for reports")


class RunConfig(_Table):
    """[run]: how it is computed."""

    target: int | str = Field(default="argmax", description="argmax, label (of each sample), a class by number or name")
    seed: int = Field(default=0, description="of methods that draw numbers, and of random weights")
    device: str = Field(default="cpu", description="cpu, cuda, cuda:1, mps, ...")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="below float32: automatic mixed precision"
    )
    batch_size: int | None = Field(default=None, description="images per pass; default: what pays on the device")
    workers: int = Field(default=0, description="processes that read images")


class Config(_Table):
    """A whole experiment; `attrbox.pipeline.config.load` makes one."""

    methods: NonEmpty[Entry] = Field(
        default=["saliency", "grad_cam"], description='names, or {name = "...", OPTION = VALUE}'
    )
    metrics: NonEmpty[Entry] = Field(default=["morf", "lerf"], description="the same")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    output: OutputConfig = OutputConfig()
    run: RunConfig = RunConfig()

    @field_validator("methods", "metrics")
    @classmethod
    def _exist(cls, entries: list[Entry], info: ValidationInfo) -> list[Entry]:
        try:
            registry: Registry[Any] = method_registry if info.field_name == "methods" else metric_registry
            current = [(name, registry[name].current(options)) for name, options in _pairs(entries)]
            choose(registry, current)
        except AttrboxError as error:
            raise ValueError(str(error)) from error
        return [{"name": name, **options} if options else name for name, options in current]

    @property
    def chosen_methods(self) -> list[tuple[str, dict[str, Any]]]:
        """Names with options."""
        return _pairs(self.methods)

    @property
    def chosen_metrics(self) -> list[tuple[str, dict[str, Any]]]:
        """Names with options."""
        return _pairs(self.metrics)

    def to_toml(self) -> str:
        """Write the config as a file, with all that is set; `load` reads it back."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def load(
    path: str | Path | None = None,
    sets: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    *,
    trust: bool = False,
) -> Config:
    """A config from a file, with changes.

    Args:
        path: a TOML file; None for the defaults.
        sets: changes as text, "run.seed=3"; values are TOML, or else words.
        given: changes as values, by "table.key"; None changes nothing.
        trust: the file may name a factory of models, whose code will run.

    Raises:
        FileError: there is no such file.
        OptionError: it is not TOML; a key is unknown, or a value of the wrong type; a method or an option of it does
            not exist; it names a factory and is not trusted. The message says where.
    """
    text = "" if path is None else _read(path)
    return parse(text, str(path), sets, given, trust=trust)


def parse(
    text: str, origin: str, sets: Sequence[str] = (), given: Mapping[str, Any] | None = None, *, trust: bool = False
) -> Config:
    """The same from the text of a file; `origin` is what messages call it."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{origin} is not TOML: {error}.") from error
    places = {key: f"{origin}, line {line}" for key, line in _lines(text).items()}
    named = values.get("model", {}).get("name") if isinstance(values.get("model"), dict) else None
    for one in sets:
        key, equals, value = one.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"Expected --set KEY=VALUE, as in --set run.seed=3, got {shown(one)}.")
        _put(values, key.strip(), _value(value.strip()), "--set")
        places[key.strip()] = f"--set {one}"
    for key, value in (given or {}).items():
        if value is not None:
            _put(values, key, value, key)
            places[key] = f"the option for {key}"
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise OptionError(_told(error.errors(), places, origin)) from error
    name = config.model.name
    if name == named and not trust and not name.startswith("torchvision:") and name not in SHORTHANDS:
        raise OptionError(
            f"{places.get('model.name', origin)} names the factory {name!r}, whose code would run. If you trust it, "
            "pass --trust, or name it yourself with --model."
        )
    return config


def described() -> list[tuple[str, str, Any, str]]:
    """Every key: its table, its name, its default and a line of help."""
    rows = []
    for name, field in Config.model_fields.items():
        tables = {name: field.default} if isinstance(field.default, _Table) else {"": Config()}
        for table, holder in tables.items():
            keys = type(holder).model_fields if table else {name: field}
            rows += [(table, key, getattr(holder, key), str(keys[key].description)) for key in keys]
    return rows


# ------------------------------------------------------------------------------------------------------------- checking


def _lines(text: str) -> dict[str, int]:
    """Where each key of a TOML file stands."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            table = f"{header[1]}."
            found.setdefault(header[1], number)
        elif key := re.match(r"\s*([\w.-]+|\"[^\"]*\")\s*=", line):
            found.setdefault(table + key[1].strip('"'), number)
    return found


def _put(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    *tables, name = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise OptionError(f"{where}: {table!r} is no table, so there is no {key!r}.")
    values[name] = value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read(path: str | Path) -> str:
    try:
        return as_path(path, "the name of a config").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FileError(f"Cannot read the config {str(path)!r} ({error}).") from error


def _pairs(entries: Sequence[Entry]) -> list[tuple[str, dict[str, Any]]]:
    """Names with options.

    Raises:
        OptionError: a table has no name.
    """
    pairs: list[tuple[str, dict[str, Any]]] = []
    for entry in entries:
        options = {"name": entry} if isinstance(entry, str) else dict(entry)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise OptionError(f'Expected a name, or a table with one, {{name = "..."}}, got {shown(entry)}.')
        pairs.append((name, options))
    return pairs


def _told(errors: Sequence[ErrorDetails], places: Mapping[str, str], origin: str) -> str:
    """Say what is wrong with a config, and where: the first key that is wrong."""
    path = _key(errors[0])
    name = ".".join(path)
    where, given = places.get(name, origin), errors[0]["input"]
    match errors[0]["type"]:
        case "extra_forbidden":
            table: Any = Config.model_fields[path[0]].annotation if len(path) > 1 else Config
            return f"{where}: there is no {name!r}. {near_miss(path[-1], table.model_fields)}"
        case "model_type":
            return f"{where}: expected a table [{name}], got {shown(given)}."
        case "value_error":
            return f"{where}: {errors[0]['ctx']['error']}"
    # A key of several types has an error for each of them.
    wanted = [error["msg"].removeprefix("Input should be ") for error in errors if _key(error) == path]
    return f"{where}: expected {name} to be {' or '.join(dict.fromkeys(wanted))}, got {shown(given)}."


def _key(error: ErrorDetails) -> list[str]:
    """The key that an error is about; behind it come places in lists and alternatives of a union."""
    first = str(error["loc"][0])
    is_table = first in Config.model_fields and isinstance(Config.model_fields[first].default, _Table)
    return [str(part) for part in error["loc"][: 2 if is_table else 1]]

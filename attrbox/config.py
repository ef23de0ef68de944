"""Configs: one TOML file per experiment, checked before anything runs.

    [model]                                 [data]                      [output]
    name = "torchvision:resnet50"           path = "imagenet/val"       path = "out/imagenet.h5"
    weights = "DEFAULT"

    [run]                                   methods = ["saliency", {name = "integrated_gradients", steps = 100}]
    target = "label"                        metrics = ["morf", "lerf"]

`methods` and `metrics` stand above the first table. `attrbox configs` prints all keys with their defaults.
"""

import dataclasses
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attrbox.errors import FileError, OptionError, near_miss
from attrbox.methods.base import choose
from attrbox.methods.base import methods as method_registry
from attrbox.metrics.base import metrics as metric_registry
from attrbox.models import SHORTHANDS

Entry = str | dict[str, Any]


def _key(default: Any, help: str) -> Any:
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """[model]: what is explained."""

    name: str = _key("efficientnet_lite0", "torchvision:NAME, package.module:factory (needs --trust), a shorthand")
    weights: str | None = _key(None, "a file, a set of torchvision, DEFAULT, or none (random)")


@dataclass(frozen=True)
class DataConfig:
    """[data]: on what."""

    path: str | list[str] = _key("demo:photographs", "a folder of images, files, or demo:photographs")
    resize: int | None = _key(None, "short side in pixels; default: the model's own preprocessing")
    crop: int | None = _key(None, "side of the square cut out of the middle")
    mean: list[float] | None = _key(None, "of the normalisation, per channel, of pixels from 0 to 1")
    std: list[float] | None = _key(None, "of the normalisation")


@dataclass(frozen=True)
class OutputConfig:
    """[output]: where the maps go, and how."""

    path: str = _key("out/maps.h5", "the HDF5 file")
    dtype: Literal["float32", "float16", "float64"] = _key("float32", "of the maps")
    compression: Literal["none", "lzf", "gzip"] = _key("none", "of the maps")
    channels: Literal["all", "one"] = _key("all", "one: channels reduced to the map for the eye")
    photographs: bool = _key(True, "keep a small picture of each sample, for reports")


@dataclass(frozen=True)
class RunConfig:
    """[run]: how it is computed."""

    target: int | str = _key("argmax", "argmax, label (of each sample), a class by number or name")
    seed: int = _key(0, "of methods that draw numbers, and of random weights")
    device: str = _key("cpu", "cpu, cuda, cuda:1, mps, ...")
    precision: Literal["float32", "bfloat16", "float16"] = _key("float32", "below float32: automatic mixed precision")
    batch_size: int | None = _key(None, "images per pass; default: what pays on the device")
    workers: int = _key(0, "processes that read images")


@dataclass(frozen=True)
class Config:
    """A whole experiment; `attrbox.config.load` makes one."""

    methods: list[Entry] = _key(lambda: ["saliency", "grad_cam"], 'names, or {name = "...", OPTION = VALUE}')
    metrics: list[Entry] = _key(lambda: ["morf", "lerf"], "the same")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    output: OutputConfig = OutputConfig()
    run: RunConfig = RunConfig()

    @property
    def chosen_methods(self) -> list[tuple[str, dict[str, Any]]]:
        """Names with options."""
        return [_pair(entry) for entry in self.methods]

    @property
    def chosen_metrics(self) -> list[tuple[str, dict[str, Any]]]:
        """Names with options."""
        return [_pair(entry) for entry in self.metrics]

    def to_toml(self) -> str:
        """The config as a file, with all that is set; `load` reads it back."""
        lines = [f"{name} = {_toml(getattr(self, name))}" for name in ("methods", "metrics")]
        for name in ("model", "data", "output", "run"):
            lines += ["", f"[{name}]"]
            for key, value in vars(getattr(self, name)).items():
                if value is not None:
                    lines.append(f"{key} = {_toml(value)}")
        return "\n".join(lines) + "\n"


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
            raise OptionError(f"Expected --set KEY=VALUE, as in --set run.seed=3, got {one!r}.")
        _put(values, key.strip(), _value(value.strip()), "--set")
        places[key.strip()] = f"--set {one}"
    for key, value in (given or {}).items():
        if value is not None:
            _put(values, key, value, key)
            places[key] = f"the option for {key}"
    config: Config = _built(Config, values, "", places, origin)
    for kind, check in (
        ("methods", lambda: choose(method_registry, config.chosen_methods)),
        ("metrics", lambda: choose(metric_registry, config.chosen_metrics)),
    ):
        try:
            check()
        except (OptionError, LookupError) as error:
            raise OptionError(f"{places.get(kind, origin)}: {error}") from error
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
    for one in dataclasses.fields(Config):
        default = getattr(Config(), one.name)
        if dataclasses.is_dataclass(default):
            rows += [
                (one.name, key.name, getattr(default, key.name), key.metadata["help"])
                for key in dataclasses.fields(default)
            ]
        else:
            rows.append(("", one.name, default, one.metadata["help"]))
    return rows


# ------------------------------------------------------------------------------------------------------------- checking


def _built(cls: type, values: Mapping[str, Any], prefix: str, places: Mapping[str, str], origin: str) -> Any:
    """A dataclass of the values, each of which must be known and of the type that the field declares."""
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            where = places.get(prefix + key, origin)
            raise OptionError(f"{where}: there is no {prefix + key!r}. {near_miss(key, hints)}")
    built = {}
    for key, value in values.items():
        hint, name = hints[key], prefix + key
        where = places.get(name, origin)
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise OptionError(f"{where}: expected a table [{name}], got {value!r}.")
            built[key] = _built(typing.cast(type, hint), value, f"{name}.", places, origin)
        elif not _fits(value, hint):
            raise OptionError(f"{where}: expected {name} to be {_words(hint)}, got {value!r}.")
        else:
            built[key] = value
    return cls(**built)


def _fits(value: Any, hint: Any) -> bool:
    form, inner = typing.get_origin(hint), typing.get_args(hint)
    if form in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if form is Literal:
        return value in inner and isinstance(value, str)
    if form is list:
        return isinstance(value, list) and bool(value) and all(_fits(item, inner[0]) for item in value)
    if form is dict:
        return isinstance(value, dict) and isinstance(value.get("name"), str)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _words(hint: Any) -> str:
    form, inner = typing.get_origin(hint), typing.get_args(hint)
    if form in (typing.Union, types.UnionType):
        return " or ".join(_words(one) for one in inner if one is not type(None))
    if form is Literal:
        return " or ".join(repr(word) for word in inner)
    if form is list:
        return f"a list, each of it {_words(inner[0])}"
    if form is dict:
        return "a table with a name"
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[hint]


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
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FileError(f"Cannot read the config {str(path)!r} ({error}).") from error


def _pair(entry: Entry) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    return entry["name"], {key: value for key, value in entry.items() if key != "name"}


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items()) + "}"
    return "[" + ", ".join(_toml(one) for one in value) + "]"

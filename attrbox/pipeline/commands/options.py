"""Options that several commands have, and the errors of all."""

import enum
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from attrbox.errors import AttrboxError

# Options by their old names, which work for one release.
_RENAMED = {"--samples": "--n-samples", "--beside": "--keep-both"}


class Group(TyperGroup):
    """Commands whose mistakes are told in one line, with exit status 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for place, (flag, *value) in enumerate(arg.split("=", 1) for arg in args):
            if new := _RENAMED.get(flag):
                if new in (arg.split("=", 1)[0] for arg in args):
                    raise typer.BadParameter(f"{flag} and {new} are old and new name of one option. Drop {flag}.")
                typer.echo(f"attrbox: the option {flag} is called {new} now.", err=True)
                args[place] = "=".join([new, *value])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AttrboxError as error:
            told = [str(error), *getattr(error, "__notes__", [])]
            typer.echo(f"attrbox: {printable(' '.join(' '.join(told).split()))}", err=True)
            raise typer.Exit(2) from None


def printable(text: str) -> str:
    """The text with what could drive a terminal, such as escape sequences in file names, as backslash escapes."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def say(text: str) -> None:
    """Print text that may have names of files and classes in it."""
    typer.echo(printable(text))


def say_json(value: Any) -> None:
    """Print a value for programs; JSON has no NaN and no infinity, so these become null."""
    typer.echo(json.dumps(_finite(json.loads(json.dumps(value, default=str))), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Precision(enum.StrEnum):
    """Arithmetic of the passes through the model."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Paths = Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders of them.")]
Model = Annotated[
    str,
    typer.Option(
        "--model", help="torchvision:NAME, timm:NAME, hf:NAME_OR_FOLDER, package.module:factory, or efficientnet_lite0."
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="A file with a state dictionary, DEFAULT (downloaded), or none (random). Default: those on this machine."
    ),
]
Methods = Annotated[
    list[str],
    typer.Option(
        "--methods", "--method", "-m", help="NAME[:OPTION=VALUE,...], separated by commas, also repeated; or all."
    ),
]
Target = Annotated[
    str, typer.Option(help="The class to explain: number, name, one per image separated by commas, or argmax.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]
Seed = Annotated[int, typer.Option(help="For methods that draw numbers, and for random weights.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per pass; by memory if not given.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Automatic mixed precision below float32.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
MapsPath = Annotated[Path, typer.Argument(metavar="FILE", help="A file of maps.")]

"""The command: `attrbox demo | methods | explain | compare | export | inspect | evaluate | report | doctor | ...`.

What users get wrong is told in one line, with exit status 2. What takes long to import is imported where it is needed.
"""

import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attrbox.core.memory import keep_pages
from attrbox.errors import FileError, RenamedWarning
from attrbox.pipeline.commands.configs import configs
from attrbox.pipeline.commands.doctor import doctor
from attrbox.pipeline.commands.evaluate import evaluate
from attrbox.pipeline.commands.export import export
from attrbox.pipeline.commands.inspect import inspect
from attrbox.pipeline.commands.options import (
    AsJson,
    BatchSize,
    Device,
    Group,
    Methods,
    Model,
    Paths,
    Precision,
    PrecisionOption,
    Seed,
    Target,
    Weights,
    say,
    say_json,
)
from attrbox.pipeline.commands.pieces import merge, split
from attrbox.pipeline.commands.report import report

if TYPE_CHECKING:
    from attrbox.data.loading import Images
    from attrbox.data.models.loaded_model import LoadedModel
    from attrbox.methods.base import MethodSpec
    from attrbox.methods.comparison import Comparison

DEFAULT_MODEL = "efficientnet_lite0"
# Fast enough to be waited for, and one of each family.
DEFAULT_METHODS = [
    "saliency,gradient_x_input,guided_backprop,deeplift,lrp_epsilon,integrated_gradients,smoothgrad,grad_cam"
]
DEMO_METHODS = [
    "saliency,gradient_x_input,guided_backprop,deconvnet,deeplift,lrp_epsilon,epsilon_plus,excitation_backprop,"
    "integrated_gradients,smoothgrad,squared_smoothgrad,vargrad,grad_cam,layer_cam,guided_grad_cam,occlusion:window=32,stride=16,learned:fast=True,"
    "learned_clean:fast=True,random"
]


app = typer.Typer(
    cls=Group,
    help="Attribution maps for PyTorch image classifiers: one engine, every method, side by side.\n\n"
    "Exit status 0 if all went well, 1 if something is left undone or damaged, 2 for what cannot be done, with the "
    "reason.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


Out = Annotated[Path, typer.Option(help="Folder for the results; files that are there are replaced.")]


@app.command()
def demo(
    out: Out = Path("out/demo"),
    methods: Methods = DEMO_METHODS,
    device: Device = "cpu",
    seed: Seed = 0,
    batch_size: BatchSize = None,
    precision: PrecisionOption = Precision.FLOAT32,
) -> None:
    """Many methods side by side: a real ImageNet classifier on real photographs.

    Writes comparison.png, maps.h5 and table.md. Needs the extra `demo`, and no download.

    Example: `attrbox demo --out out/demo`
    """
    from attrbox.data.images import demo_photographs

    compare(
        demo_photographs(),
        methods=methods,
        out=out,
        device=device,
        seed=seed,
        batch_size=batch_size,
        precision=precision,
    )


@app.command()
def compare(
    images: Paths,
    model: Model = DEFAULT_MODEL,
    weights: Weights = None,
    methods: Methods = DEFAULT_METHODS,
    target: Target = "argmax",
    out: Out = Path("out"),
    device: Device = "cpu",
    seed: Seed = 0,
    batch_size: BatchSize = None,
    precision: PrecisionOption = Precision.FLOAT32,
) -> None:
    """Several methods side by side: one figure, one file of maps, one table.

    Writes comparison.png (a row per image, a column per method), maps.h5 and table.md.

    Example: `attrbox compare cat.jpg dog.jpg --model torchvision:resnet50 -m saliency,integrated_gradients:steps=100`
    """
    loaded, batch, result = _run(images, model, weights, methods, target, device, seed, batch_size, precision)
    result.plot(out / "comparison.png", titles=_titles(loaded, result), photographs=loaded.photographs(batch.values))
    result.to_hdf5(
        out / "maps.h5",
        ids=batch.names,
        sources=[str(path) for path in batch.sources],
        model_name=loaded.name,
        overwrite=True,
    )
    _write(out / "table.md", result.table() + "\n")
    say(f"{result.table()}\n\nWrote {out / 'comparison.png'}, {out / 'maps.h5'} and {out / 'table.md'}.")


@app.command()
def explain(
    images: Paths,
    model: Model = DEFAULT_MODEL,
    weights: Weights = None,
    methods: Methods = DEFAULT_METHODS,
    target: Target = "argmax",
    out: Out = Path("out"),
    device: Device = "cpu",
    seed: Seed = 0,
    batch_size: BatchSize = None,
    precision: PrecisionOption = Precision.FLOAT32,
) -> None:
    """One picture per image and method: the photograph and the map over it.

    Writes IMAGE/METHOD.png into the folder of the results.

    Example: `attrbox explain cat.jpg --method grad_cam --target "tiger cat" --out out/cat`
    """
    from attrbox.visualization.plots import plot_map

    loaded, batch, result = _run(images, model, weights, methods, target, device, seed, batch_size, precision)
    photographs, titles = loaded.photographs(batch.values), _titles(loaded, result)
    files = _file_names(list(result))
    for label, maps in result.items():
        for name, title, photograph, heatmap in zip(batch.names, titles, photographs, maps.heatmap(), strict=True):
            path = out / name / f"{files[label]}.png"
            plot_map(photograph, heatmap, path, title=f"{label}: {' '.join(title.split())}")
            say(str(path))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to see its options.")] = None,
    as_json: AsJson = False,
) -> None:
    """The methods; with a name, that method's options and their defaults.

    Examples: `attrbox methods`, `attrbox methods integrated_gradients`, `attrbox methods --json`
    """
    from attrbox.methods.base import method_registry as registry
    from attrbox.methods.describing import describe

    specs = list(registry.values()) if name is None else [registry[name]]
    if as_json:
        records = [_record(spec) for spec in specs]
        say_json(records if name is None else records[0])
    elif name is None:
        _print_table(["Method", "Aliases", "Summary", "Reference"], [_cells(spec) for spec in specs])
    else:
        say(str(describe(name)))


for command in (export, inspect, evaluate, report, doctor, configs, merge, split):
    app.command()(command)


def main() -> None:
    """The entry point; models beside the working directory can be named too."""
    sys.path.insert(0, "")
    keep_pages()
    warnings.simplefilter("default", RenamedWarning)  # tell users, not only developers
    app()


# ------------------------------------------------------------------------------------------------------ the work


def _run(
    paths: list[Path],
    model: str,
    weights: str | None,
    methods: list[str],
    target: str,
    device: str,
    seed: int,
    batch_size: int | None,
    precision: Precision,
) -> tuple["LoadedModel", "Images", "Comparison"]:
    """Load, explain, and bring the results back to the CPU."""
    import torch

    from attrbox.data.loading import load_images
    from attrbox.data.models.loading import load_model
    from attrbox.methods.explaining import compare
    from attrbox.pipeline.arguments import parse_device, parse_methods, parse_target

    chosen = parse_methods(methods)
    place = parse_device(device)
    loaded = load_model(model, weights=weights, seed=seed).to(place)
    batch = load_images(paths, loaded.preprocess)
    result = compare(
        loaded.model,
        batch.values.to(place),
        chosen,
        target=parse_target(target, loaded),
        seed=seed,
        batch_size=batch_size,
        precision=None if precision is Precision.FLOAT32 else getattr(torch, precision),
    )
    return loaded, batch, result


def _titles(loaded: "LoadedModel", result: "Comparison") -> list[str]:
    """What the model sees in each image, and the explained class where that is another."""
    if result.predictions is None:
        return [""] * len(result.images)
    classes, probabilities = (values.tolist() for values in loaded.predict(result.images))
    explained = next(iter(result.values())).target
    titles = [f"{loaded.class_name(i)} {p:.0%}" for i, p in zip(classes, probabilities, strict=True)]
    if explained is not None:
        for row, (seen, index) in enumerate(zip(classes, explained.tolist(), strict=True)):
            titles[row] += "" if seen == index else f"\nexplained: {loaded.class_name(index)}"
    return titles


def _file_names(labels: list[str]) -> dict[str, str]:
    """A file's name for each label, different also where a file system does not tell case."""
    names: dict[str, str] = {}
    for label in labels:
        name = stem = re.sub(r"[^-A-Za-z0-9_.,=() ]", "_", label)
        number = 1
        while name.lower() in {taken.lower() for taken in names.values()}:
            number += 1
            name = f"{stem} #{number}"
        names[label] = name
    return names


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileError(f"Cannot write {str(path)!r} ({error.strerror}). Choose another folder with --out.") from error


def _record(spec: "MethodSpec") -> dict[str, Any]:
    fields = ("name", "aliases", "summary", "reference", "units", "reduction")
    options = [{"name": option.name, "default": option.default, "help": option.help} for option in spec.options]
    return {field: getattr(spec, field) for field in fields} | {"options": options}


def _cells(spec: "MethodSpec") -> list[str]:
    return [spec.name, ", ".join(spec.aliases), spec.summary, spec.reference]


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table that fits the terminal; in a pipe it is 160 columns wide."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)
    console.print(table)

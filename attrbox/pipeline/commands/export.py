"""`attrbox export`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attrbox.pipeline.commands.configs import SetOption, Trust
from attrbox.pipeline.commands.options import AsJson, say, say_json

if TYPE_CHECKING:
    from attrbox.pipeline.config import Config
    from attrbox.pipeline.export import Summary

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="A TOML file; options win over it.")]


def export(
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Image files, or folders of them.")
    ] = None,
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006 - typer copies it
    model: Annotated[str | None, typer.Option(help="torchvision:NAME, package.module:factory, or a shorthand.")] = None,
    weights: Annotated[str | None, typer.Option(help="A file, a set of torchvision, DEFAULT, or none.")] = None,
    methods: Annotated[
        list[str], typer.Option("--methods", "--method", "-m", help="NAME[:OPTION=VALUE,...], separated by commas.")
    ] = [],  # noqa: B006
    target: Annotated[str | None, typer.Option(help="argmax, label, or a class by number or name.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="A CSV file of two columns, file and label; default: the names of the folders.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The HDF5 file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or float64.")] = None,
    compression: Annotated[str | None, typer.Option(help="none, lzf or gzip.")] = None,
    channels: Annotated[str | None, typer.Option(help="all, or one: the map for the eye.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = None,
    seed: Annotated[int | None, typer.Option(help="For methods that draw numbers, and for random weights.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per pass.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read images.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again the samples that had no map.")] = False,
    keep_both: Annotated[bool, typer.Option("--keep-both", help="Write a method with other options, too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="K/N", help="Share K of N, in a file of its own; under torchrun by itself.")
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """The maps of any number of images into one HDF5 file; after a kill the same command goes on.

    `--target label` explains the class that each image's folder is named after: by name, WordNet id or number, never
    by the folder's place; or the one that a table gives it (--labels).

    Under torchrun each process writes its share, joined in the end. Exit status 0 if every image has every map, 1 if
    some have none (the file tells why), 2 if it could not begin or go on, as on a full disk; what is done stays.

    Examples: `attrbox export photos/ -m saliency,grad_cam --out maps.h5`, `attrbox export --config
    configs/imagenet.toml --set run.device=cuda`
    """
    from attrbox.pipeline.arguments import parse_methods
    from attrbox.pipeline.config import load

    given = {
        "data.path": [str(path) for path in images] if images else None,
        "data.labels": None if labels is None else str(labels),
        "model.name": model,
        "model.weights": weights,
        "methods": [{"name": name, **options} for name, options in parse_methods(methods)] if methods else None,
        "output.path": None if out is None else str(out),
        "output.dtype": dtype,
        "output.compression": compression,
        "output.channels": channels,
        "run.target": int(target) if target and target.removeprefix("-").isdecimal() else target,
        "run.device": device,
        "run.seed": seed,
        "run.precision": precision,
        "run.batch_size": batch_size,
        "run.workers": workers,
    }
    resolved = load(config, sets, given, trust=trust)
    if images is None and config is None:
        raise typer.BadParameter("give images, a folder of them, or --config FILE")
    summary = _run(resolved, retry, keep_both, overwrite, shard)
    if as_json:
        say_json({**dataclasses.asdict(summary), "complete": summary.complete})
    else:
        say(str(summary))
    if not summary.complete:
        raise typer.Exit(1)


def _run(config: "Config", retry: bool, keep_both: bool, overwrite: bool, shard: str | None) -> "Summary":
    from attrbox.pipeline.export import export
    from attrbox.pipeline.from_config import model_of, precision_of, samples_for, target_of
    from attrbox.pipeline.settings import Loading, Running, Storage
    from attrbox.pipeline.shards import Shard

    loaded = model_of(config)
    output = config.output
    return export(
        loaded,
        samples_for(config, loaded),
        output.path,
        config.chosen_methods,
        target=target_of(config, loaded),
        seed=config.run.seed,
        loading=Loading(labels=config.data.labels, workers=config.run.workers),
        storage=Storage(
            dtype=output.dtype,
            compression=None if output.compression == "none" else output.compression,
            channels=output.channels,
            thumbnails=output.thumbnails,
            config=config.to_toml(),
        ),
        running=Running(
            batch_size=config.run.batch_size,
            precision=precision_of(config),
            retry=retry,
            keep_both=keep_both,
            overwrite=overwrite,
            shard=None if shard is None else Shard.parsed(shard),
        ),
    )

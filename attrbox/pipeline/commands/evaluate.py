"""`attrbox evaluate`: measure the maps of a file."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from attrbox.pipeline.commands.configs import SetOption, Trust
from attrbox.pipeline.commands.options import AsJson, BatchSize, MapsPath, say, say_json


def evaluate(
    file: MapsPath,
    metrics: Annotated[
        list[str],
        typer.Option(
            "--metrics", "--metric", help="NAME[:OPTION=VALUE,...], separated by commas; default: the config's."
        ),
    ] = [],  # noqa: B006 - typer copies it
    model: Annotated[str | None, typer.Option(help="Another model than the one that was explained.")] = None,
    weights: Annotated[str | None, typer.Option(help="Its weights.")] = None,
    data: Annotated[Path | None, typer.Option(help="Where the images are now.")] = None,
    n_samples: Annotated[int | None, typer.Option(min=1, help="Measure the first of them only.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = None,
    batch_size: BatchSize = None,
    sets: SetOption = [],  # noqa: B006
    csv: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure the maps of a file that `attrbox export` wrote, and keep the scores in it.

    Model and images are those that the file's config names. Samples without a map of each method are left out. Exit
    status 2 if nothing could be measured.

    Examples: `attrbox evaluate maps.h5`, `attrbox evaluate maps.h5 --metrics morf:fill=blur,sparseness --n-samples 200`
    """
    from attrbox.data.maps.reader import open_maps
    from attrbox.errors import InputError, RenamedWarning
    from attrbox.pipeline.arguments import parse_methods
    from attrbox.pipeline.config import parse
    from attrbox.pipeline.evaluate_file import measure
    from attrbox.pipeline.stored_scores import write_scores

    with open_maps(file) as maps:
        text = str(maps.attributes.get("config", ""))
        if not text:
            raise InputError(
                f"{str(file)!r} has no config, so nobody knows its model and images. Measure it by "
                "attrbox.evaluate(model, images, maps)."
            )
        given: dict[str, Any] = {
            "metrics": [{"name": name, **options} for name, options in parse_methods(metrics)] if metrics else None,
            "model.name": model,
            "model.weights": weights or ("DEFAULT" if model and model.startswith("torchvision:") else None),
            "data.path": None if data is None else str(data),
            "run.device": device,
            "run.batch_size": batch_size,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RenamedWarning)  # of what the file says
            text = parse(text, f"the config in {str(file)!r}", trust=True).to_toml()
        config = parse(text, f"the config in {str(file)!r}", sets, given, trust=trust)
        evaluation, rows = measure(maps, config, n_samples, another=model is not None)
        count = maps.samples
    write_scores(file, evaluation, rows, count)
    if csv is not None:
        evaluation.to_csv(csv)
    if as_json:
        say_json({"path": str(file), "samples": len(rows), "scores": evaluation.rows()})
    else:
        say(f"{evaluation.table()}\n\n{len(rows)} samples measured; the scores are in {file}.")

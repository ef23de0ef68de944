"""The command `attrbox doctor MODEL`."""

from typing import Annotated

import typer

from attrbox.pipeline.commands.options import AsJson, say, say_json


def doctor(
    model: Annotated[str, typer.Argument(help="torchvision:NAME, package.module:factory, or a shorthand.")],
    weights: Annotated[
        str | None, typer.Option(help="A file with a state dictionary; for torchvision also DEFAULT or none (random).")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; the model's own if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the image, and of random weights.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit status 1 unless every method for this kind of model is exact.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What is exact, approximate, not tested or refused for a model, and why; tried in float64 on an image of noise.

    Exit status 1 with --strict if a verdict is another than exact (methods that are for other kinds of models may
    refuse), 2 if the model cannot be loaded or does not run.

    Examples: `attrbox doctor torchvision:swin_t --weights none`, `attrbox doctor efficientnet_lite0 --json`
    """
    import torch

    from attrbox.data.models.loading import load_model
    from attrbox.methods.diagnosis import doctor as diagnose
    from attrbox.pipeline.arguments import parse_device

    place = parse_device(device)
    loaded = load_model(model, weights=weights, seed=seed).to(place)
    dtype = torch.float32 if place.type == "mps" else torch.float64  # which has no float64
    side: int = size if size is not None else getattr(loaded.preprocess, "crop", 224)
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, 3, side, side, generator=generator, dtype=torch.float64).to(place, dtype)
    diagnosis = diagnose(loaded.model.to(dtype), image)
    if as_json:
        findings = [{"method": f.method, "verdict": f.verdict, "reason": f.reason} for f in diagnosis.findings]
        made_of = {"operations": diagnosis.operations, "unknown": diagnosis.unknown}
        say_json({"model": loaded.name, "findings": findings, **made_of})
    else:
        say(diagnosis.table())
    if strict and not diagnosis.exact:
        raise typer.Exit(1)

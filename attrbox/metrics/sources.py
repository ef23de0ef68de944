"""Where maps come from: a `Comparison`, an open HDF5 file, a mapping of tensors; and the controls beside them.

Whatever they come from, they are read chunk by chunk, so that a file may be larger than the memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import h5py
import torch
from torch import Tensor, nn

from attrbox.core.random_streams import numbers
from attrbox.core.results import Attribution, ChannelReduction, Provenance
from attrbox.core.validation import dense
from attrbox.data.maps.attributes import options_in, provenance_in, streams_in
from attrbox.data.maps.reader import MapsFile
from attrbox.data.maps.schema import dataset_name
from attrbox.errors import AttrboxError, InputError, shown
from attrbox.methods.base import method_registry as registry
from attrbox.metrics.records import Explainer, Maps, Recipe

MapsLike: TypeAlias = "Mapping[str, Any] | MapsFile | h5py.File"
# What makes maps again: a function, a method, or a method with its options.
ExplainerLike: TypeAlias = "str | tuple[str, Mapping[str, Any]] | Explainer"

# An explainer that ignores the model.
Control: TypeAlias = Callable[[nn.Module | None, Tensor, Tensor | None, Sequence[int]], Tensor]

# The draw of a sample's stream that is the random control.
_CONTROL = 2**40 + 2
_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


@dataclass(frozen=True, eq=False)
class Source:
    """The maps of one method, on demand.

    Attributes:
        values: [N, C, H, W], [N, 1, H, W] or [N, H, W]: a tensor, an array or a dataset.
        reduction: how channels become one map: "sum" or "max".
        target: the classes that they explain, [N]; None if that is not known.
        function: whether they explain a function instead.
        explainer: makes them again.
        expected: what each map should sum to, [N], by the method when it made them; None if that is not known.
        score: what was explained, [N], in units of the model's output; None if that is not known.
    """

    values: Any
    reduction: ChannelReduction = "sum"
    target: Tensor | None = None
    function: bool = False
    explainer: Explainer | None = None
    expected: Tensor | None = None
    score: Tensor | None = None


def read(maps: MapsLike, explainers: Mapping[str, ExplainerLike] | None = None) -> dict[str, Source]:
    """The maps of each label.

    Raises:
        InputError: there are none, or something else, or maps of several targets at once, or an explainer of none.
    """
    if isinstance(maps, MapsFile):
        maps = maps.file
    if isinstance(maps, h5py.Group):
        sources = _in_file(maps)
    elif isinstance(maps, Mapping):
        sources = {label: _source(label, maps[label]) for label in maps}
    else:
        raise InputError(
            f"Expected maps as a Comparison, a mapping from names to tensors, or an open file of maps, got "
            f"{type(maps).__name__}. For one method: {{'name': maps}}."
        )
    if not sources:
        raise InputError("Expected the maps of at least one method, got none.")
    given = dict(explainers or {})
    if stray := sorted(given.keys() - sources.keys()):
        raise InputError(f"Expected explainers of {', '.join(sources)}, got some of {', '.join(stray)}.")
    return {
        label: source if label not in given else _explained_by(source, given[label])
        for label, source in sources.items()
    }


def _source(label: str, maps: Any) -> Source:
    if isinstance(maps, Tensor):
        return Source(dense(maps, f"the maps of {label!r}"))
    if not isinstance(maps, Attribution):
        if not hasattr(maps, "shape") or not hasattr(maps, "__getitem__"):
            raise InputError(f"Expected the maps of {label!r} as a tensor [N, H, W], got {type(maps).__name__}.")
        return Source(maps)
    _check_one_target(label, tuple(maps.score.shape))
    recipe = _recipe(maps.method, maps.options, maps.provenance)
    expected, score = maps.expected, maps.score
    return Source(maps.values, maps.reduction, maps.target, maps.target is None, recipe, expected, score)


def _check_one_target(label: str, scores: tuple[int, ...]) -> None:
    if len(scores) > 1:
        raise InputError(
            f"The maps of {label!r} explain {scores[1]} targets for each image; metrics take one. Measure them one by "
            "one: evaluate(model, images, {name: maps.values[:, k]}, target=maps.target[:, k])."
        )


def _in_file(file: h5py.Group) -> dict[str, Source]:
    """What `attrbox.data.maps.schema.write_maps` wrote."""
    if "maps" not in file or "samples" not in file:
        raise InputError("Expected a file that attrbox wrote, with /maps and /samples, got another.")
    samples = file["samples"]
    target = torch.as_tensor(samples["target"][()]) if "target" in samples else None
    score = torch.as_tensor(samples["score"][()]) if "score" in samples else None
    if score is not None:
        _check_one_target("the file", score.shape)
    sources, seeds = {}, streams_in(file)
    for name, dataset in file["maps"].items():
        attributes = dict(dataset.attrs)
        label = attributes.get("label", name)
        done = samples[f"done/{dataset_name(label)}"][()]
        if not done.all():
            raise InputError(
                f"Only {int(done.sum())} of {len(done)} maps of {label!r} are in the file. Finish writing it first."
            )
        reduction: ChannelReduction = "max" if attributes.get("reduction") == "max" else "sum"
        recipe = _recipe(attributes.get("method"), options_in(file, dataset), provenance_in(dataset, seeds))
        expected = f"expected/{dataset_name(label)}"
        promised = torch.as_tensor(samples[expected][()]) if expected in samples else None
        sources[label] = Source(dataset, reduction, target, target is None, recipe, promised, score)
    return sources


def _recipe(method: Any, options: Mapping[str, Any] | None, provenance: Provenance) -> Recipe | None:
    """How maps were made; None if that cannot be told any more, as of options that a file keeps as words alone."""
    if method not in registry or options is None:
        return None
    try:
        options = registry[method].current(options, warn=False)
        registry[method].create(options)
    except AttrboxError:
        return None
    return Recipe(str(method), options, provenance)


def _explained_by(source: Source, explainer: ExplainerLike) -> Source:
    if isinstance(explainer, str):
        explainer = (explainer, {})
    if isinstance(explainer, tuple):
        name, options = explainer
        explainer = Recipe(registry[name].name, registry[name].current(options))
    elif not callable(explainer) and not isinstance(explainer, Recipe):
        raise InputError(
            "Expected an explainer as a method's name, (name, {option: value}) or a function, "
            f"got {shown(explainer)}."
        )
    return replace(source, explainer=explainer)


def known_target(sources: Mapping[str, Source]) -> Tensor | None:
    """The classes [N] that the maps are known to explain, on the CPU.

    Raises:
        InputError: they explain different ones, or a function, which only the caller has.
    """
    if any(source.function for source in sources.values()):
        raise InputError("The maps explain a function. Pass it again: evaluate(..., target=function).")
    known = {label: source.target for label, source in sources.items() if source.target is not None}
    if not known:
        return None
    first, target = next(iter(known.items()))
    found = target.cpu()
    for label, other in known.items():
        if other is not target and not torch.equal(other.cpu(), found):  # methods of one call share theirs
            raise InputError(f"{first!r} and {label!r} explain different targets. Evaluate them one by one.")
    return found


def chunks(sources: Mapping[str, Source], rows: slice, images: Tensor) -> dict[str, Maps]:
    """The maps of some samples by label.

    Raises:
        InputError: they are not finite.
    """
    found = {label: _chunk(source, rows, images) for label, source in sources.items()}
    finite = [maps.values.isfinite().flatten(1).all(1) for maps in found.values()]
    if not bool(torch.stack(finite).all()):  # one look at the device for all
        label, fine = next((label, fine) for label, fine in zip(found, finite, strict=True) if not bool(fine.all()))
        bad = (~fine).nonzero().flatten() + rows.start
        raise InputError(
            f"Expected finite maps, got NaN or infinity in those of {label!r}, samples {bad.tolist()[:10]}. Leave out "
            "these samples, or the method."
        )
    return found


def _chunk(source: Source, rows: slice, images: Tensor) -> Maps:
    """The maps of some samples, [n, C or 1, H, W], on the device and in the dtype of these."""
    part = source.values[rows]
    values = part.detach().to(images) if isinstance(part, Tensor) else torch.as_tensor(part).to(images)
    if images.dim() > 2 and values.dim() == images.dim() - 1:
        values = values[:, None]
    expected, score = (None if one is None else one[rows].to(images) for one in (source.expected, source.score))
    reduction = source.reduction if values.dim() > 2 else "sum"
    return Maps(values, reduction, source.explainer, expected, score)


def check_shapes(sources: Mapping[str, Source], images: Tensor) -> None:
    """Refuse maps of other samples or another size.

    Raises:
        InputError: with what was expected.
    """
    count, sides = len(images), tuple(images.shape[2:]) if images.dim() > 2 else tuple(images.shape[1:])
    for label, source in sources.items():
        shape = tuple(source.values.shape)
        allowed = (
            {(count, *sides)}
            if images.dim() == 2
            else {(count, *sides), (count, 1, *sides), (count, images.shape[1], *sides)}
        )
        if shape not in allowed:
            many = len(shape) == len(images.shape) + 1
            remedy = (
                "Choose one target: maps[:, k]."
                if many
                else "Pass the images that the maps are of."
                if shape[:1] != (count,)
                else "Resize the maps to the images."
            )
            raise InputError(
                f"Expected maps of the {count} images, {list(sides)} each, with or without channels, got "
                f"{list(shape)} for {label!r}. {remedy}"
            )


# ------------------------------------------------------------------------------------------------------- the controls


def random_control(model: nn.Module | None, images: Tensor, target: Tensor | None, seeds: Sequence[int]) -> Tensor:
    """Standard normal numbers from the seed of each image alone, [n, 1, H, W] ([n, D] for vectors)."""
    del model, target
    shape = images.shape[1:] if images.dim() == 2 else (1, *images.shape[2:])
    return numbers(seeds, _CONTROL, shape, images)


def sobel_control(model: nn.Module | None, images: Tensor, target: Tensor | None, seeds: Sequence[int]) -> Tensor:
    """Edges: the length of the Sobel gradient of the channels' mean, [n, 1, H, W]; border pixels are repeated."""
    del model, target, seeds
    across = torch.tensor(_SOBEL, dtype=images.dtype, device=images.device)
    kernels = torch.stack([across, across.T])[:, None]
    grey = nn.functional.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    edges: Tensor = nn.functional.conv2d(grey, kernels).square().sum(1, keepdim=True).sqrt()
    return edges


def defined_controls(images: Tensor) -> dict[str, Control]:
    """The controls that are defined on images of this shape, by name."""
    edges: dict[str, Control] = {"sobel": sobel_control} if images.dim() == 4 else {}
    return {"random": random_control, **edges}


def control_maps(control: Control, images: Tensor, seeds: Sequence[int]) -> Maps:
    """The maps of a control."""
    return Maps(control(None, images, None, seeds), "sum", control)

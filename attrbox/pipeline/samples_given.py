"""The data that `export` was given, as samples with labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attrbox.data.labels import ClassNames
from attrbox.data.maps.attributes import plain
from attrbox.data.maps.writer import Growing
from attrbox.data.models.loaded_model import LoadedModel
from attrbox.data.samples import Picture, Samples, SamplesLike, samples_of
from attrbox.errors import FileError, InputError, ModelError
from attrbox.methods.base import Method, MethodSpec, method_registry as registry
from attrbox.methods.comparison import MethodLike
from attrbox.pipeline.job import ExportTarget, count_classes


def samples_given(
    data: SamplesLike,
    loaded: LoadedModel | None,
    preprocess: Callable[[Any], Tensor] | None,
    ids: Sequence[str] | None,
    thumbnails: bool,
) -> Samples:
    """The data as samples, with the preprocessing and the thumbnails of the model that came with them."""
    picture = Picture(loaded.mean, loaded.std) if loaded else Picture()
    preprocess = preprocess or (loaded.preprocess if loaded else None)
    return samples_of(data, preprocess=preprocess, ids=ids, picture=picture if thumbnails else None)


def understood(
    samples: Samples, loaded: LoadedModel | None, module: nn.Module | Callable[[Tensor], Any], target: ExportTarget
) -> tuple[Samples, ClassNames]:
    """The samples with labels that are classes of the model, where they can be, and what these classes are called."""
    categories = loaded.categories if loaded else None
    required = isinstance(target, str)
    try:
        labels = samples.label_names
    except InputError:
        if required:
            raise
        samples, labels = samples.unlabeled(), None
    if labels is None:
        return samples, ClassNames(categories, None if categories is None else len(categories))
    count = count_classes(module, samples)
    if categories is not None and count not in (None, len(categories)):
        raise ModelError(
            f"Expected a name for each of the model's {count} classes, got {len(categories)} of them. Labels cannot be "
            "told by these."
        )
    names = ClassNames(categories, count).assumed(labels)
    return samples.translated(names, required), names


def labelled(
    chosen: Mapping[str, tuple[MethodSpec, Method]],
    methods: Sequence[MethodLike],
    growing: Growing | None,
    keep_both: bool,
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """label -> name and options. What the file has with the same options keeps the label that it has there."""
    entries: dict[str, tuple[str, Mapping[str, Any]]] = {}
    there = {} if growing is None else {label: _current(*made) for label, made in growing.methods.items()}
    for (label, (spec, method)), entry in zip(chosen.items(), methods, strict=True):
        options = plain(spec.settings(method))
        same = [known for known, made in there.items() if made == (spec.name, options)]
        if same:
            label = same[0]
        elif label in there:
            old = there[label][1]
            other = {name: (old.get(name), value) for name, value in options.items() if old.get(name) != value}
            if not keep_both:
                told = ", ".join(f"{name} {was!r} there and {now!r} here" for name, (was, now) in other.items())
                raise FileError(
                    f"The file has {label!r} with other options: {told}. Keep both (Running(keep_both=True), "
                    "--keep-both), give the same options, or choose another path."
                )
            label = f"{label}({', '.join(f'{name}={now}' for name, (_, now) in other.items())})"
        entries[label] = (spec.name, {} if isinstance(entry, str) else spec.current(entry[1], warn=False))
    return entries


def _current(name: str, options: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """A method in a file, its options by their names of today."""
    return name, registry[name].current(options, warn=False) if name in registry else options

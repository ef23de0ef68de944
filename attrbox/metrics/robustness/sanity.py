"""Sanity checks: a map that explains a model must change with its weights, and with what it was taught.

Cascading randomisation redraws the layers from the output down to the input, one after the other; independent
randomisation one at a time. After each, all methods explain again, with the same targets and seeds, and the maps are
compared with those of the model as it is (Adebayo et al. 2018). Label randomisation compares with a model that was
trained on permuted labels. The controls, which ignore the model, stay as they are and score 1.

Layers are taken in the order in which they run, not in that of their registration. All this happens on a copy: the
model itself is not touched.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attrbox.core.options import REQUIRED, option
from attrbox.core.random_streams import mixed
from attrbox.core.validation import check_choice, check_count
from attrbox.engine.calling import forward
from attrbox.errors import InputError, ModelError, OptionError
from attrbox.metrics.base import Measurement, Metric, register_metric
from attrbox.metrics.context import Study
from attrbox.metrics.records import Maps
from attrbox.metrics.robustness.similarity import spearman, ssim

SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "spearman": spearman,
    "spearman_abs": lambda a, b: spearman(a.abs(), b.abs()),
    "ssim": ssim,
}


@dataclass(frozen=True, kw_only=True)
class Randomization(Metric):
    """How alike the maps are to those of another model; 1 for a map that ignores it.

    The measurements' details hold the curves of all similarities that are defined, [n, points].
    """

    similarity: str = option("spearman", "spearman, spearman_abs (of the absolute maps) or ssim (of maps in 0 .. 1)")

    needs = frozenset({"model", "methods"})

    def __post_init__(self) -> None:
        check_choice("similarity", self.similarity, tuple(SIMILARITIES))

    def defined(self, study: Study) -> list[str]:
        """The similarities that can be measured on maps of this shape."""
        if study.images.dim() != 4 and self.similarity == "ssim":
            raise InputError(f"ssim compares images [N, C, H, W], got {list(study.images.shape)}. Use 'spearman'.")
        return [name for name in SIMILARITIES if study.images.dim() == 4 or name != "ssim"]

    def compared(self, study: Study, stages: Sequence[Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The curves [n, stages] by label and similarity, from what `alike` says of each stage."""
        return {
            label: {
                name: torch.stack([stage[f"{label} {name}"] for stage in stages], 1) for name in self.defined(study)
            }
            for label in study.maps
        }

    def alike(self, study: Study, maps: Mapping[str, Maps]) -> dict[str, Tensor]:
        """The similarities [n] of maps with the study's own, by "label similarity"."""
        return {
            f"{label} {name}": SIMILARITIES[name](study.maps[label].heatmap, other.heatmap)
            for label, other in maps.items()
            for name in self.defined(study)
        }


@dataclass(frozen=True, kw_only=True)
class ParameterRandomization(Randomization):
    """The mean over the stages, that without randomisation apart; the curve begins with it, at 1."""

    steps: int = option(10, "the layers are randomised in so many groups of equal size, or fewer if they are fewer")

    axis = "share of layers randomised"
    cascading: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)

    def measure(self, study: Study, outputs: Sequence[Tensor]) -> Mapping[str, Measurement]:
        assert study.model is not None
        shares, stages = [0.0], [self.alike(study, study.maps)]
        seed = study.seed  # of the call, so that all chunks compare with the same models
        for share, model in randomized(
            study.model, study.images[:1], steps=self.steps, cascading=self.cascading, seed=seed
        ):
            shares.append(share)
            stages.append(self.alike(study, study.explain(model, study.images)))
        fractions = study.images.new_tensor(shares)
        return {
            label: Measurement(
                curves[self.similarity][:, 1:].mean(1), curves[self.similarity], fractions, details=curves
            )
            for label, curves in self.compared(study, stages).items()
        }


@register_metric(
    "cascading_randomization",
    summary="Likeness of the maps as layers are randomised from the output down",
    reference="Adebayo et al. 2018",
    better="lower",
)
@dataclass(frozen=True, kw_only=True)
class CascadingRandomization(ParameterRandomization):
    """Each stage keeps what the stages before have randomised."""


@register_metric(
    "independent_randomization",
    summary="Likeness of the maps as groups of layers are randomised one at a time, from the output down",
    reference="Adebayo et al. 2018",
    better="lower",
)
@dataclass(frozen=True, kw_only=True)
class IndependentRandomization(ParameterRandomization):
    """Each stage begins with the model as it is."""

    axis = "place of the randomised layers below the output"
    cascading = False


@register_metric(
    "label_randomization",
    summary="Likeness of the maps to those of a model trained on permuted labels",
    reference="Adebayo et al. 2018",
    better="lower",
)
@dataclass(frozen=True, kw_only=True)
class LabelRandomization(Randomization):
    """`attrbox.metrics.training.train_on_permuted_labels` makes the other model."""

    other: nn.Module = option(REQUIRED, "the model that was trained on permuted labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.other, nn.Module):
            raise OptionError(f"Expected other to be a model (torch.nn.Module), got {type(self.other).__name__}.")

    def measure(self, study: Study, outputs: Sequence[Tensor]) -> Mapping[str, Measurement]:
        stages = [self.alike(study, study.explain(self.other, study.images))]
        compared = self.compared(study, stages)
        return {
            label: Measurement(
                curves[self.similarity][:, 0], details={name: curve[:, 0] for name, curve in curves.items()}
            )
            for label, curves in compared.items()
        }


# ------------------------------------------------------------------------------------------------------ randomisation


def randomized(
    model: nn.Module, images: Tensor, *, steps: int = 10, cascading: bool = True, seed: int = 0
) -> Iterator[tuple[float, nn.Module]]:
    """Copies of the model with more and more of its layers, or one group after the other, drawn anew.

    Args:
        model: in evaluation mode.
        images: what it is run on to see the order of its layers.
        steps: in how many groups.
        cascading: whether layers stay randomised.
        seed: of the new weights; each layer has a stream of its own.

    Yields:
        The share of layers that are above this stage's lowest, and the copy; the same object each time if cascading.

    Raises:
        ModelError: the model has no parameters, or cannot be copied.
    """
    names = execution_order(model, images)[::-1]
    if not names:
        raise ModelError("Expected a model with parameters to randomise, got one without.")
    steps = min(steps, len(names))
    done, other = 0, _copied(model)
    for step in range(1, steps + 1):
        stop = round(len(names) * step / steps)
        if not cascading:
            other = _copied(model)
        for index in range(done, stop):
            randomize(other.get_submodule(names[index]), mixed(seed, index))
        done = stop
        yield stop / len(names), other


def execution_order(model: nn.Module, images: Tensor) -> list[str]:
    """The modules with parameters of their own by the time at which their first call ends, first to last.

    A module that is never called, as its parent uses its parameters directly, has the time of the nearest parent that
    is. Shared modules come once.
    """
    ends: dict[nn.Module, int] = {}
    copied = _copied(model)

    def note(module: nn.Module, args: object, output: object) -> None:
        ends.setdefault(module, len(ends))

    handles = [module.register_forward_hook(note) for module in copied.modules()]
    try:
        with torch.no_grad():
            forward(copied, images.clone())
    finally:
        for handle in handles:
            handle.remove()
    modules = dict(copied.named_modules())

    def end(name: str) -> int:
        while modules[name] not in ends and name:
            name = name.rpartition(".")[0]
        return ends.get(modules[name], len(ends))

    own = [name for name, module in modules.items() if next(module.parameters(recurse=False), None) is not None]
    return sorted(own, key=end)  # stable: what ends together stays in the order of registration


def randomize(module: nn.Module, seed: int) -> None:
    """Draw a module's own parameters anew: as it initialises itself or else, if it cannot, normal with the standard
    deviation that each has."""
    devices = {parameter.device.index for parameter in module.parameters(recurse=False) if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        torch.manual_seed(seed)
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            return
        for parameter in module.parameters(recurse=False):
            deviation = parameter.std().item() if parameter.numel() > 1 else parameter.abs().item()
            parameter.normal_(std=deviation or 1.0)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a user's model raises when it is copied
        raise ModelError(
            f"Expected a model that can be copied (copy.deepcopy), as its weights are to be randomised, but "
            f"{type(error).__name__}: {error}."
        ) from error

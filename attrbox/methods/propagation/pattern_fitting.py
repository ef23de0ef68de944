"""Patterns of a model's layers, fitted to images in one pass (Kindermans et al., ICLR 2018, sections 4.1 and 4.2).

Of a neuron y = w x (without its bias) over images and positions, E over all and E+ over those where it fires, that is,
where its output with the bias is positive:

    linear           a = cov(x, y) / var(y)                                                           equation 6
    two_component    a = d / (w d),     d = E+[x y] - E+[x] E[y]                                      equation 8

The latter is made for the rectifier behind a neuron. Where none is, as behind the last layer, before a residual sum or
in a linear bottleneck, positive and negative outputs count alike, and the former is taken.

Of both, w a = 1: the pattern accounts for all of y. The sums over patches of a convolution are derivatives with respect
to its weights, sum_p x_p g_p = d/dw sum_p y_p g_p, so no patches are laid out. y is taken less its mean over the first
batch, which changes neither estimator but for rounding; sums over a batch are added up in float64.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attrbox.core.hashing import architecture_hash, tensors_hash, weights_hash
from attrbox.core.model_state import check_model, untouched
from attrbox.core.outputs import unwrap
from attrbox.core.progress import passing_bar
from attrbox.core.validation import check_choice, check_count, check_images
from attrbox.engine.site import LAYERS, RECTIFIERS, LayerInfo, Rule, Site
from attrbox.engine.tape import record
from attrbox.errors import InputError, UnsupportedModelError
from attrbox.methods.propagation.pattern_attribution import LayerNames, Patterns

ESTIMATORS = ("two_component", "linear")


def fit_patterns(
    model: nn.Module,
    data: Tensor | Dataset[Any] | Iterable[Any],
    *,
    estimator: str = "two_component",
    batch_size: int = 32,
    progress: bool = True,
) -> Patterns:
    """Fit the patterns that `pattern_net` and `pattern_attribution` propagate.

    Args:
        model: as for `attrbox.explain`; left as it was.
        data: images [N, C, H, W], a dataset of images, or any iterable of batches, such as a data loader; of pairs and
            longer tuples the first is taken. They are moved to the device of the model.
        estimator: "two_component" where a rectifier alone takes a layer's output, "linear" elsewhere; or "linear"
            everywhere.
        batch_size: images per pass, for tensors and datasets.
        progress: show a progress bar on long work, if a terminal is there to show it.

    Raises:
        OptionError: an option is out of range.
        InputError: there are no images, or what came is none.
        ModelError: the model does not run, or has a transposed convolution, where patterns are not defined: its
            outputs see different parts of the kernel.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_count("batch_size", batch_size)
    module = check_model(model)
    place = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
    fitting = _Fitting(estimator)
    count = 0
    with untouched(module), _bar(data, progress) as bar:
        for batch in _batches(data, batch_size):
            images = check_images(batch).detach().to(place)
            tape = record(module, images.clone() if images.is_inference() else images, [fitting])
            fitting.names = LayerNames(tape)
            tape.replay(unwrap(tape.output), [tape.images], fitting, keep=False)
            count += len(images)
            bar.update(len(images))
        if not count:
            raise InputError("Expected images to fit patterns to, got none.")
        values = {name: sums.pattern() for name, sums in fitting.sums.items()}
        about = {"estimator": estimator, "images": count, "weights_sha256": weights_hash(module)}
        about["architecture_sha256"] = architecture_hash(module)
    return Patterns(values, {**about, "sha256": tensors_hash(values)})


@dataclass
class _Sums:
    """What is summed of one layer.

    Attributes:
        weight: w, [neurons, ...].
        level: what y is taken less of, [neurons].
        total: y, [neurons].
        fired: how often a neuron fired, [neurons].
        inputs, products: x and x y where it fired, of the weights' shape.
        count: how many y there were of each neuron.
    """

    weight: Tensor
    level: Tensor
    total: Tensor
    fired: Tensor
    inputs: Tensor
    products: Tensor
    count: int = 0

    @classmethod
    def empty(cls, weight: Tensor, level: Tensor) -> "_Sums":
        """Nothing summed yet."""
        exact = torch.float32 if weight.device.type == "mps" else torch.float64  # which has no other
        total, inputs = torch.zeros_like(level, dtype=exact), torch.zeros_like(weight, dtype=exact)
        return cls(weight, level, total, total.clone(), inputs, inputs.clone())

    def pattern(self) -> Tensor:
        """a, of the weights' shape and dtype; 0 where the neuron never fired or never changed."""
        shape = (-1, *(1,) * (self.weight.dim() - 1))
        fired = self.fired.clamp(min=1).view(shape)
        both, apart = self.products / fired, self.inputs / fired * (self.total / self.count).view(shape)
        terms = (self.weight.to(both) * torch.stack([both, -apart])).reshape(2, len(both), -1)
        along = terms.sum((0, 2))
        still = along.abs() <= torch.finfo(self.weight.dtype).eps * terms.abs().sum((0, 2))  # rounding alone
        values = (both - apart) / along.masked_fill(still, 1.0).view(shape)
        return values.masked_fill(still.view(shape), 0.0).to(self.weight)


class _Fitting(Rule):
    """The true gradient; at each layer on its way, adds to the sums."""

    kinds = LAYERS | RECTIFIERS
    needs = frozenset({"input"})

    def __init__(self, estimator: str) -> None:
        self.linear = estimator == "linear"
        self.names: LayerNames | None = None
        self.sums: dict[str, _Sums] = {}

    def propagate(self, site: Site, grad_output: Tensor) -> Any:
        assert self.names is not None
        if site.kind in RECTIFIERS:
            return site.true_gradient(grad_output)
        if site.about(LayerInfo).turned:
            raise UnsupportedModelError(
                f"Patterns are not defined at transposed convolutions, whose outputs see different parts of the kernel "
                f"({site.where}). Use another method."
            )
        self._add(self.names[site], site)
        return site.true_gradient(grad_output)

    def _add(self, name: str, site: Site) -> None:
        layer = site.about(LayerInfo)
        bias, weight = layer.bias, layer.weight.detach()
        with torch.enable_grad():
            leaf = weight.clone().requires_grad_()
            output = layer.apply(site.input.detach(), leaf, None)
        y = output.detach()
        axis = y.dim() + layer.axis
        neurons = [-1 if place == axis else 1 for place in range(y.dim())]
        others = [place for place in range(y.dim()) if place != axis]
        level = 0 if bias is None else bias.view(neurons)
        every = self.linear or layer.activation is None
        fires = torch.ones_like(y) if every else (y + level > 0).to(y.dtype)
        if name not in self.sums:
            self.sums[name] = _Sums.empty(weight, y.mean(others))
        sums = self.sums[name]
        y = y - sums.level.view(neurons)
        sums.count += y.numel() // len(weight)
        sums.total += y.sum(others)
        sums.fired += fires.sum(others)
        for part, seed in ((sums.inputs, fires), (sums.products, fires * y)):
            part += torch.autograd.grad(output, leaf, seed, retain_graph=True)[0]


def _batches(data: Any, batch_size: int) -> Iterator[Any]:
    if isinstance(data, Tensor):
        yield from torch.split(data, batch_size)
        return
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size)
    if not isinstance(data, Iterable):
        raise InputError(
            f"Expected images [N, C, H, W], a dataset, or an iterable of batches, got {type(data).__name__}."
        )
    for batch in data:
        yield batch[0] if isinstance(batch, tuple | list) and batch else batch


def _bar(data: Any, progress: bool) -> Any:
    total = len(data) if isinstance(data, Tensor | Dataset) and hasattr(data, "__len__") else None
    if isinstance(data, DataLoader) and hasattr(data.dataset, "__len__"):
        total = len(data.dataset)
    return passing_bar("patterns", total, "image", progress)

"""A run: one chunk of images under one model, and all that methods may want to know about it, computed once.

Every quantity is kept under its arguments, so two methods that ask for the same one share its passes through the
model: one recorded forward serves all rules, one set of noise samples the whole SmoothGrad family. What is asked for
with other arguments is computed anew, and nothing is computed that nobody asks for.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from attrbox.engine.folding import Unwatched
from attrbox.engine.recorder import Reference, forward
from attrbox.engine.site import Rule
from attrbox.engine.stem import Stem, stem_of
from attrbox.engine.tape import Tape, record
from attrbox.errors import InputError, ModelError
from attrbox.guard import BlackBox
from attrbox.memory import backing_off
from attrbox.methods.base import identity
from attrbox.perturbations import fill_images
from attrbox.seeds import numbers
from attrbox.targets import Target, unwrap

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What holds for every chunk of a call.

    Attributes:
        target: what is explained.
        seeds: one seed, or one per image of the call.
        precision: dtype of automatic mixed precision, or None.
        channels_last: run passes over many images in the channels_last memory format.
        progress: called with the number of passes (an image forward and backward) that have been done.
    """

    target: Target
    seeds: Sequence[int]
    precision: torch.dtype | None = None
    channels_last: bool = True
    progress: Callable[[int], None] = lambda passes: None


@dataclass(frozen=True)
class Moments:
    """Mean and mean square of the gradients over noisy copies, [n, K, C, H, W]; `variance` is the biased one."""

    mean: Tensor
    variance: Tensor

    @property
    def mean_square(self) -> Tensor:
        """E[g^2] = Var[g] + E[g]^2."""
        return self.variance + self.mean**2


class Run:
    """One chunk. Methods call its functions; the planner makes it and throws it away.

    Attributes:
        images: [n, ...].
        per_pass: how many images a forward pass may take.

    `rules`, `layers` and `asked` are those that methods will ask for; without `keep`, just one of the former once, so
    that the recorded activations can be freed while it is replayed.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        settings: Settings,
        rows: slice,
        per_pass: int,
        rules: Sequence[Rule | None] = (),
        layers: Sequence[str | None] = (),
        keep: bool = True,
        asked: Collection[object] = (),
    ) -> None:
        self.model = model
        self.images = images
        self.settings = settings
        self.rows = rows
        self.per_pass = per_pass
        self._rules = rules
        self._layers = layers
        self._taped = bool(rules or layers)
        self._keep = keep
        self._asked = asked
        self._cache: dict[tuple[object, ...], object] = {}
        self._unwatched = Unwatched(model)
        self._details: dict[str, Any] = {}

    def tell(self, **details: Any) -> None:
        """What a method has to tell besides its maps; it becomes the `details` of the `Attribution`.

        Tensors are [n, K, ...] and are joined over the chunks; so are objects with a class method `joined(parts)`.
        Of anything else there is a list, one entry per chunk.
        """
        self._details.update(details)

    def told(self) -> dict[str, Any]:
        """What has been told since the last call."""
        details, self._details = self._details, {}
        return details

    # ------------------------------------------------------------------------------------ one recorded forward pass

    @property
    def tape(self) -> Tape:
        """The recorded forward pass of the images."""

        def compute() -> Tape:
            with self.autocast():
                return record(self.model, self.images, self._rules, self._layers)

        return self.once(("tape",), compute)

    def release(self) -> None:
        """Forget the recorded pass, once the methods that replay it are done."""
        self._scored()  # outlives the tape, as the path and noise methods need the targets
        self._cache = {
            key: value for key, value in self._cache.items() if key[0] not in ("tape", "output", "reference")
        }

    @property
    def scores(self) -> Tensor:
        """The explained scores of the images, [n, K], without gradient."""
        return self._scored()[0]

    def scores_in(self, unit: str) -> Tensor:
        """The same in another unit (`attrbox.targets.UNITS`), [n, K]; one more pass unless it is "logit"."""

        def compute() -> Tensor:
            return self.settings.target.score(self.bare(self.images), self.indices, unit).to(self.images.dtype)

        return self.scores if unit == "logit" else self.once(("scored", unit), compute)

    @property
    def indices(self) -> Tensor | None:
        """The explained class indices, [n, K]; None for a target function."""
        return self._scored()[1]

    @property
    def predictions(self) -> Tensor | None:
        """The class of the largest output, [n]; None if the outputs are not [n, classes]."""
        return self._scored()[2]

    def bare_forward(self) -> Tensor:
        """The model's outputs with nothing recorded."""
        with self.autocast():
            return self._check(unwrap(forward(self.model, self.images.clone())), len(self.images))

    def _scored(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        def compute() -> tuple[Tensor, Tensor | None, Tensor | None]:
            if self._taped:
                output = self._output()
            else:  # nobody replays anything at the images themselves
                with torch.no_grad():
                    output = self.bare_forward()
            indices = self.settings.target.resolve(output, self.rows)
            scores = self.settings.target.score(output, indices).detach().to(self.images.dtype)
            return scores, indices, output.detach().argmax(1) if output.dim() == 2 else None

        return self.once(("scored",), compute)

    def output(self, tape: Tape, count: int | None = None) -> Tensor:
        """The scores of a recorded pass over `count` images, [count, ...]; all of the chunk by default.

        Raises:
            ModelError: the model returned something else.
        """
        return self._check(unwrap(tape.output), len(self.images) if count is None else count)

    def _output(self) -> Tensor:
        return self.once(("output",), lambda: self._check(unwrap(self.tape.output), len(self.images)))

    def _replay(self, inputs: Tensor, rule: Rule | None = None, reference: Reference | None = None) -> Tensor:
        """The gradient of each score with respect to `inputs`, [n, K, ...]."""
        scores = self.settings.target.score(self._output(), self.indices)
        count = scores.shape[1]
        with self.autocast():
            gradients = [
                self.tape.replay(scores[:, k], [inputs], rule, reference=reference, keep=self._keep or k + 1 < count)[0]
                for k in range(count)
            ]
        return torch.stack(gradients, 1).to(self.images.dtype)

    def gradient(self, rule: Rule | None = None, baseline: float | Tensor = 0.0) -> Tensor:
        """Gradient of each score with respect to the images, propagated by `rule`, [n, K, C, H, W].

        Args:
            rule: None for the true gradient.
            baseline: what a rule that uses a reference compares with.
        """
        uses_reference = rule is not None and rule.uses_reference
        key = ("gradient", rule, identity(baseline) if uses_reference else None)

        def compute() -> Tensor:
            reference = self.reference(baseline) if uses_reference else None
            return self._replay(self.tape.images, rule, reference)

        return self.once(key, compute)

    def feature_map(self, layer: str | None) -> tuple[Tensor, Tensor]:
        """A layer's output [n, C, ...], and the gradient of each score with respect to it, [n, K, C, ...]."""

        def compute() -> tuple[Tensor, Tensor]:
            features, grid = self.tape.feature_maps[layer], self.tape.grids[layer]
            gradient = self._replay(features)
            spatial = grid.spatial(gradient.flatten(0, 1))
            return (
                grid.spatial(features.detach()).to(self.images.dtype),
                spatial.reshape(*gradient.shape[:2], *spatial.shape[1:]),
            )

        return self.once(("feature_map", layer), compute)

    # ------------------------------------------------------------------------------------------- baselines, references

    def baseline(self, baseline: float | Tensor) -> Tensor:
        """A baseline as a tensor: [1, C, H, W] if all images share it, else [n, C, H, W].

        Raises:
            InputError: its shape does not fit the images, or it is not finite.
        """
        if not isinstance(baseline, Tensor):
            return torch.full_like(self.images[:1], float(baseline))
        wanted = self.images.shape[1:]
        tensor = baseline.detach().to(self.images)
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise InputError("Expected a finite baseline, got NaN or infinity in it.")
        if tensor.shape == wanted:
            return tensor[None]
        if tensor.shape[1:] == wanted and len(tensor) == 1:
            return tensor
        if tensor.shape[1:] == wanted and len(tensor) == self.settings.target.samples:
            return tensor[self.rows]
        raise InputError(
            f"Expected a baseline of shape {list(wanted)}, {[1, *wanted]} or "
            f"{[self.settings.target.samples, *wanted]}, got {list(tensor.shape)}."
        )

    def fill(self, fill: "str | float | Tensor", sigma: float, draw: int = 0) -> Tensor:
        """What hidden pixels show, [1 or n, C, ...]: a baseline, or one of the words of `attrbox.perturbations.FILLS`.

        Args:
            fill: a number, a tensor or a word.
            sigma: standard deviation of the fill "blur", in pixels.
            draw: which numbers of each image's stream the fill "noise" takes.
        """
        if not isinstance(fill, str):
            return self.baseline(fill)
        return fill_images(self.images, fill, lambda: self.normal(draw), sigma)

    def reference(self, baseline: float | Tensor) -> Reference:
        """The recorded forward pass of a baseline."""

        def compute() -> Reference:
            with self.autocast():
                return self.tape.record_reference(self.baseline(baseline))

        return self.once(("reference", identity(baseline)), compute)

    def baseline_scores(self, baseline: float | Tensor) -> Tensor:
        """The explained scores at the baseline, [n, K]."""

        def compute() -> Tensor:
            reference = self._cache.get(("reference", identity(baseline)))
            if isinstance(reference, Reference):
                raw = reference.output
            else:
                with self.autocast(), torch.no_grad():
                    raw = forward(self.model, self.baseline(baseline).clone())
            output = unwrap(raw)
            output = output.expand(len(self.images), *output.shape[1:])
            return self.settings.target.score(output, self.indices).detach().to(self.images.dtype)

        return self.once(("baseline_scores", identity(baseline)), compute)

    # ------------------------------------------------------------------------------------------ many passes per image

    def path_gradient(self, steps: int, quadrature: str, baseline: float | Tensor) -> Tensor:
        """The gradient averaged along the straight line from the baseline to the image, [n, K, C, H, W].

        sum_k w_k grad f(x0 + a_k (x - x0)),     nodes a_k and weights w_k of `quadrature` on [0, 1]
        """

        def compute() -> Tensor:
            nodes, weights = (torch.from_numpy(values).to(self.images) for values in quadratures[quadrature](steps))
            start = self.baseline(baseline)
            change = self.images - start
            return self._weighted(weights, lambda draws: start + _steps(nodes[draws], change) * change)

        return self.once(("path", steps, quadrature, identity(baseline)), compute)

    def noise_mean(self, samples: int, noise: float) -> Tensor:
        """The mean of `noise_moments`, [n, K, C, H, W]; for less than the moments, if no method asks for those."""
        if noise_key(samples, noise) in self._asked:
            return self.noise_moments(samples, noise).mean

        def compute() -> Tensor:
            weights = self.images.new_full((samples,), 1 / samples)
            return self._weighted(weights, self._noisy(noise))

        return self.once(("noise mean", samples, noise), compute)

    def noise_moments(self, samples: int, noise: float) -> Moments:
        """Moments of the gradient over `samples` copies with Gaussian noise, of standard deviation
        `noise * (max - min)` of each image.

        Sample k of an image depends on the image's seed and on k alone: neither on the chunk nor on its batch mates.
        """

        def compute() -> Moments:
            mean, squares, count = self._zeros(), self._zeros(), 0
            for draws, gradients, _ in self._gradients(samples, self._noisy(noise)):
                # Welford's update by groups (Chan et al. 1979): no cancellation in the variance.
                size = draws.stop - draws.start
                group = gradients.mean(0)
                squares += ((gradients - group) ** 2).sum(0) + (group - mean) ** 2 * (count * size / (count + size))
                mean += (group - mean) * (size / (count + size))
                count += size
            return Moments(mean, squares / samples)

        return self.once(noise_key(samples, noise), compute)

    def _noisy(self, noise: float) -> Callable[[slice], Tensor]:
        """Draws -> noisy copies of the images, [draws, n, ...]."""
        images = self.images
        axes = tuple(range(1, images.dim()))
        deviation = noise * (images.amax(axes, keepdim=True) - images.amin(axes, keepdim=True))
        return lambda draws: images + self._noise(draws) * deviation

    def normal(self, draw: int) -> Tensor:
        """Standard normal numbers of the images' shape; draw `draw` of each image's own stream, [1 or n, C, H, W]."""
        return self.numbers(draw, self.images.shape[1:])

    def numbers(self, draw: int, shape: Sequence[int], uniform: bool = False) -> Tensor:
        """Standard normal numbers, or uniform ones in [0, 1): draw `draw` of each image's stream, [1 or n, *shape]."""
        return numbers(self.seeds, draw, shape, self.images, uniform)

    def numbers_of(self, row: int, draw: int, shape: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1) of one image alone, of a shape of its own: draw `draw` of its stream."""
        return numbers([self.seeds[row % len(self.seeds)]], draw, shape, self.images, uniform=True)[0]

    @property
    def seeds(self) -> Sequence[int]:
        """The seeds of the chunk: one for all of its images, or one for each."""
        seeds = self.settings.seeds
        return seeds if len(seeds) == 1 else seeds[self.rows]

    def _noise(self, draws: slice) -> Tensor:
        return torch.stack([self.normal(draw) for draw in range(draws.start, draws.stop)])

    def _weighted(self, weights: Tensor, inputs: Callable[[slice], Tensor]) -> Tensor:
        """sum_k w_k grad f(x_k), [n, K, ...]: summed behind the first convolution where that can be told apart, and
        taken through it once (see `attrbox.engine.stem`)."""
        total, behind, stem = self._zeros(), None, None
        for draws, gradients, through in self._gradients(len(weights), inputs, at_stem=True):
            part = torch.einsum("s,s...->...", weights[draws], gradients)
            if through is None:
                total += part
            else:
                behind, stem = part if behind is None else behind + part, through
        if stem is not None and behind is not None:
            total += stem.pull(behind.flatten(0, 1)).view(total.shape)
        return total

    def _gradients(
        self, draws: int, inputs: Callable[[slice], Tensor], at_stem: bool = False
    ) -> Iterator[tuple[slice, Tensor, Stem | None]]:
        """Plain gradients of many versions of each image: yields (draws, gradients [draws, n, K, ...], None) by groups.

        `inputs(draws)` makes the versions, [draws, n, ...]. Groups are as large as `per_pass` allows, and shrink when
        memory runs out. With `at_stem` the gradients may be those behind the stem that comes with them.
        """

        def work(group: slice, size: int) -> tuple[Tensor, Stem | None]:
            versions = inputs(group)
            gradients, stem = self._native(versions.flatten(0, 1), self._indices(len(versions)), size, at_stem)
            return gradients.view(*versions.shape[:2], *gradients.shape[1:]), stem

        for group, (gradients, stem) in self._grouped(draws, work):
            yield group, gradients, stem

    def _grouped(self, draws: int, work: Callable[[slice, int], T]) -> Iterator[tuple[slice, T]]:
        """`work(group, per_pass)` for one group of draws after the other, as large as memory allows."""
        start = 0
        while start < draws:

            def attempt(size: int, start: int = start) -> tuple[slice, T]:
                group = slice(start, min(draws, start + max(1, size // len(self.images))))
                return group, work(group, size)

            (group, result), self.per_pass = backing_off(self.per_pass, attempt)
            yield group, result
            start = group.stop

    def _indices(self, count: int) -> Tensor | None:
        """The explained classes of `count` versions of each image, [count * n, K]."""
        return None if self.indices is None else self.indices.repeat(count, 1)

    def _native(
        self, images: Tensor, indices: Tensor | None, per_pass: int, at_stem: bool
    ) -> tuple[Tensor, Stem | None]:
        """Plain gradients of the scores, [m, K, ...], by autograd alone, `per_pass` images at a time."""
        parts: list[Tensor] = []
        stem = None
        for rows in (slice(i, i + per_pass) for i in range(0, len(images), per_pass)):
            part = images[rows]
            tape = self.plain(part)
            with self.autocast():
                output = self._check(unwrap(tape.output), len(part))
                scores = self.settings.target.score(output, None if indices is None else indices[rows])
                # Parts of one group must be of one kind; it has several only where one step is too large for a pass.
                stem = stem_of(output, tape.images) if at_stem and len(part) == len(images) else None
                inputs = [tape.images if stem is None else stem.edge]
                count = scores.shape[1]
                gradients = [tape.replay(scores[:, k], inputs, keep=k + 1 < count)[0] for k in range(count)]
            parts.append(torch.stack(gradients, 1).to(images.dtype))
            self.settings.progress(len(part))
        return torch.cat(parts) if len(parts) > 1 else parts[0], stem

    def masked(
        self, draws: int, masks: Callable[[slice], Tensor], fill: Tensor, unit: str = "logit"
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Scores of many masked versions y + m (x - y) of each image, without gradients.

        Args:
            draws: versions of each image.
            masks: a slice of the draws -> their masks m, [draws, 1 or n, 1 or C, ...].
            fill: y, what shows where the mask is 0, [1 or n, C, ...].
            unit: what the classes score.

        Yields:
            Draws, their masks and scores [draws, n, K], by groups as large as memory allows.

        Raises:
            ModelError: a score is NaN or infinite, or the model returned something ill-shaped.
        """
        change = self.images - fill

        def work(group: slice, size: int) -> tuple[Tensor, Tensor]:
            shown = masks(group)
            versions = torch.addcmul(fill, shown, change).flatten(0, 1)
            indices = self._indices(len(shown))
            scores = []
            for rows in (slice(i, i + size) for i in range(0, len(versions), size)):
                output = self.bare(versions[rows])
                score = self.settings.target.score(output, None if indices is None else indices[rows], unit)
                scores.append(score.to(self.images.dtype))
                self.settings.progress(len(score))
            return shown, torch.cat(scores).view(len(shown), len(self.images), -1)

        finite = torch.ones(len(self.images), dtype=torch.bool, device=self.images.device)
        for group, (shown, scores) in self._grouped(draws, work):
            finite &= scores.isfinite().all(2).all(0)
            yield group, shown, scores
        if not finite.is_meta and not bool(finite.all()):  # one look at the device, after all passes
            bad = ((~finite).nonzero().flatten() + self.rows.start).tolist()
            raise ModelError(
                f"The model returned NaN or infinite scores on masked versions of the images {bad[:10]}, so nothing "
                "can be told about these. Mend the model, or fill the masked pixels with something else."
            )

    def scored(
        self, versions: Tensor, rows: Tensor, columns: Tensor, unit: str = "logit", gradient: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of versions of the images, [m], and their gradients with respect to these, [m, C, ...].

        Args:
            versions: [m, C, ...], in any number and order.
            rows: whose version each is, [m].
            columns: which of the K targets it is scored for, [m].
            unit: what the classes score.
            gradient: False for the scores alone.
        """

        def work(size: int) -> tuple[Tensor, Tensor | None]:
            scores, gradients = [], []
            pieces = -(-len(versions) // size)
            for part, row, column in zip(*(t.tensor_split(pieces) for t in (versions, rows, columns)), strict=True):
                indices = None if self.indices is None else self.indices[row]
                tape = self.plain(part) if gradient else None
                output = self.output(tape, len(part)) if tape else self.bare(part)
                with self.autocast():
                    score = self.settings.target.score(output, indices, unit).gather(1, column[:, None])[:, 0]
                scores.append(score.detach().to(versions.dtype))
                if tape:
                    gradients.append(tape.replay(score, [tape.images], keep=False)[0])
                self.settings.progress(len(part))
            return torch.cat(scores), torch.cat(gradients) if gradient else None

        result, self.per_pass = backing_off(self.per_pass, work)
        return result

    def recording(self, rule: Rule, key: object) -> Tape:
        """A recorded pass of its own for a rule whose replays are differentiated; one for all with the same `key`."""

        def compute() -> Tape:
            images = self.images
            if self.settings.channels_last and images.dim() == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            with self.autocast():
                return record(self.model, images, [rule], twice=True)

        return self.once(("recording", key), compute)

    def plain(self, images: Tensor) -> Tape:
        """A forward pass of any images for their plain gradient, in the fastest way: nothing is recorded, memory
        format channels_last, batch-norm folded into convolutions."""
        return self._fastest(images, lambda images: record(self.model, images))

    def bare(self, images: Tensor) -> Tensor:
        """The outputs on any images, as fast and without an autograd graph."""
        with torch.no_grad():  # a copy for the model, which may write into it
            output = self._fastest(images, lambda images: forward(self.model, images.clone()))
        return self._check(unwrap(output), len(images))

    def _fastest(self, images: Tensor, function: Callable[[Tensor], T]) -> T:
        if isinstance(self.model, BlackBox):  # what it does with memory formats is not known
            images = images.contiguous()
        elif self.settings.channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            return self._unwatched.run(images, function)

    # ------------------------------------------------------------------------------------------------------- helpers

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Automatic mixed precision, if the call asks for it."""
        if self.settings.precision is None:
            yield
        else:
            with torch.autocast(self.images.device.type, self.settings.precision):
                yield

    def once(self, key: tuple[object, ...], compute: Callable[[], T]) -> T:
        """`compute()`, or what it returned for the same key before, also to another method."""
        if key not in self._cache:
            self._cache[key] = compute()
        return cast(T, self._cache[key])

    def _zeros(self) -> Tensor:
        images = self.images
        return images.new_zeros((len(images), self.scores.shape[1], *images.shape[1:]))

    def _check(self, output: Tensor, count: int) -> Tensor:
        if output.dim() == 0 or len(output) != count:
            raise ModelError(
                f"Expected one row of outputs per image, {count} in all, got {list(output.shape)}. Images need a batch "
                "axis: images[None] for a single one."
            )
        return output


def noise_key(samples: int, noise: float) -> tuple[object, ...]:
    """What methods that need `noise_moments` name in `Method.asks`."""
    return ("noise", samples, noise)


def _steps(nodes: Tensor, like: Tensor) -> Tensor:
    return nodes.view(-1, *(1,) * like.dim())


def _midpoint(steps: int) -> tuple[Any, Any]:
    return (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)


def _gauss_legendre(steps: int) -> tuple[Any, Any]:
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return (nodes + 1) / 2, weights / 2


def _right(steps: int) -> tuple[Any, Any]:
    return np.arange(1, steps + 1) / steps, np.full(steps, 1 / steps)


def _trapezoid(steps: int) -> tuple[Any, Any]:
    if steps == 1:
        return _midpoint(1)
    weights = np.full(steps, 1 / (steps - 1))
    weights[[0, -1]] /= 2
    return np.linspace(0, 1, steps), weights


# Nodes and weights on [0, 1]; the weights of each sum to 1.
quadratures: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "midpoint": _midpoint,
    "gauss_legendre": _gauss_legendre,
    "right": _right,
    "trapezoid": _trapezoid,
}

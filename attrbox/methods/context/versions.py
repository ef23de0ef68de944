"""Many versions of each image of a chunk: between a baseline and it, with noise, with masks."""

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from attrbox.core.memory import backing_off
from attrbox.core.options import identity
from attrbox.engine.first_convolution import Stem, stem_of
from attrbox.errors import ForwardError, ModelError, NothingHiddenWarning, TargetError
from attrbox.methods.context.passes import Once, Passes, Samples, Settings

T = TypeVar("T")


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


@dataclass(frozen=True, eq=False)
class Explained:
    """What is explained of some images.

    Attributes:
        scores: without gradient, [n, K].
        indices: of the classes, [n, K]; None for a target function.
        predictions: the class of the largest output, [n]; None if the outputs are not [n, classes].
    """

    scores: Tensor
    indices: Tensor | None
    predictions: Tensor | None


@dataclass(frozen=True)
class Moments:
    """Mean and mean square of the gradients over noisy copies, [n, K, C, H, W]; `variance` is the biased one."""

    mean: Tensor
    variance: Tensor

    @property
    def mean_square(self) -> Tensor:
        """E[g^2] = Var[g] + E[g]^2."""
        return self.variance + self.mean**2


@dataclass(eq=False)
class Versions:
    """The passes over versions of the images; what several methods ask for is computed once.

    A pass takes `per_pass` images; `asked` are quantities that methods will ask for.
    """

    settings: Settings
    samples: Samples
    passes: Passes
    explained: Explained
    per_pass: int
    asked: Collection[object]
    once: Once = field(default_factory=Once)

    def path_gradient(self, steps: int, quadrature: str, baseline: float | Tensor) -> Tensor:
        """The gradient averaged along the straight line from the baseline to the image, [n, K, C, H, W].

        sum_k w_k grad f(x0 + a_k (x - x0)),     nodes a_k and weights w_k of `quadrature` on [0, 1]
        """

        def compute() -> Tensor:
            images, start = self.samples.images, self.samples.baseline(baseline)
            nodes, weights = (torch.from_numpy(values).to(images) for values in quadratures[quadrature](steps))
            change = images - start
            return self._weighted(weights, lambda draws: start + _steps(nodes[draws], change) * change)

        return self.once(("path", steps, quadrature, identity(baseline)), compute)

    def noise_mean(self, samples: int, noise: float) -> Tensor:
        """The mean of `noise_moments`, [n, K, C, H, W]; for less than the moments, if no method asks for those."""
        if noise_key(samples, noise) in self.asked:
            return self.noise_moments(samples, noise).mean

        def compute() -> Tensor:
            weights = self.samples.images.new_full((samples,), 1 / samples)
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
        images = self.samples.images
        axes = tuple(range(1, images.dim()))
        deviation = noise * (images.amax(axes, keepdim=True) - images.amin(axes, keepdim=True))
        return lambda draws: images + self._noise(draws) * deviation

    def _noise(self, draws: slice) -> Tensor:
        return torch.stack([self.samples.normal(draw) for draw in range(draws.start, draws.stop)])

    def _weighted(self, weights: Tensor, inputs: Callable[[slice], Tensor]) -> Tensor:
        """sum_k w_k grad f(x_k), [n, K, ...]: summed behind the first convolution where that can be told apart, and
        taken through it once (see `attrbox.engine.first_convolution`)."""
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
                group = slice(start, min(draws, start + max(1, size // len(self.samples.images))))
                return group, work(group, size)

            try:
                (group, result), self.per_pass = backing_off(self.per_pass, attempt)
            except (ForwardError, TargetError):  # a model, or a target function, with something of the batch's size
                if self.per_pass <= len(self.samples.images):
                    raise
                self.per_pass = len(self.samples.images)
                continue
            yield group, result
            start = group.stop

    def _indices(self, count: int) -> Tensor | None:
        """The explained classes of `count` versions of each image, [count * n, K]."""
        return None if self.explained.indices is None else self.explained.indices.repeat(count, 1)

    def _native(
        self, images: Tensor, indices: Tensor | None, per_pass: int, at_stem: bool
    ) -> tuple[Tensor, Stem | None]:
        """Plain gradients of the scores, [m, K, ...], by autograd alone, `per_pass` images at a time."""
        parts: list[Tensor] = []
        stem = None
        for rows in (slice(i, i + per_pass) for i in range(0, len(images), per_pass)):
            part = images[rows]
            tape = self.passes.plain(part)
            with self.passes.autocast():
                output = self.passes.returned(tape.output, len(part))
                scores = self.settings.target.score(output, None if indices is None else indices[rows])
                # Parts of one group must be of one kind; it has several only where one step is too large for a pass.
                stem = stem_of(scores, tape.images) if at_stem and len(part) == len(images) else None
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

        Warns:
            NothingHiddenWarning: an image already shows what its masked pixels would.
        """
        change = self.samples.images - fill
        sizes = [part.abs().flatten(1).amax(1) for part in (change, self.samples.images)]
        hidden = sizes[0] > 8 * torch.finfo(change.dtype).eps * sizes[1]

        def work(group: slice, size: int) -> tuple[Tensor, Tensor]:
            shown = masks(group)
            versions = torch.addcmul(fill, shown, change).flatten(0, 1)
            indices = self._indices(len(shown))
            scores = []
            for rows in (slice(i, i + size) for i in range(0, len(versions), size)):
                output = self.passes.outputs(versions[rows])
                score = self.settings.target.score(output, None if indices is None else indices[rows], unit)
                scores.append(score.to(self.samples.images.dtype))
                self.settings.progress(len(score))
            return shown, torch.cat(scores).view(len(shown), len(self.samples.images), -1)

        finite = torch.ones(len(self.samples.images), dtype=torch.bool, device=self.samples.images.device)
        for group, (shown, scores) in self._grouped(draws, work):
            finite &= scores.isfinite().all(2).all(0)
            yield group, shown, scores
        if finite.is_meta or bool((finite & hidden).all()):  # one look at the device, after all passes
            return
        if not bool(finite.all()):
            bad = ((~finite).nonzero().flatten() + self.samples.rows.start).tolist()
            whole = (
                "" if unit == "logit" else f" score={unit!r} takes all classes in; score='logit' the explained alone."
            )
            raise ModelError(
                f"The model returned NaN or infinite scores on masked versions of the images {bad[:10]}, so nothing "
                f"can be told about these. Mend the model, or fill the masked pixels with something else.{whole}"
            )
        same = ((~hidden).nonzero().flatten() + self.samples.rows.start).tolist()
        warnings.warn(
            f"Hiding pixels changes nothing in the images {same[:10]}: what hides them is what they show (superpixels "
            "of one color under fill='segment', a blank image under its own value), so their maps are 0. Choose "
            "another fill.",
            NothingHiddenWarning,
            stacklevel=2,
        )

    def scored(
        self, versions: Tensor, rows: Tensor, columns: Tensor, unit: str = "logit", gradient: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of versions of the images, [m], and their gradients with respect to these, [m, C, ...].

        Args:
            versions: [m, C, ...], as many of each image.
            rows: whose version each is, [m].
            columns: which of the K targets it is scored for, [m].
            unit: what the classes score.
            gradient: False for the scores alone.
        """

        def work(size: int) -> tuple[Tensor, Tensor | None]:
            scores, gradients = [], []
            pieces = -(-len(versions) // size)
            # Image by image within each piece, as in the call itself: a model may have side inputs of the batch's size.
            order = rows.argsort(stable=True).view(len(self.samples.images), -1).T.flatten() if pieces > 1 else None
            given = (versions, rows, columns) if order is None else (versions[order], rows[order], columns[order])
            for part, row, column in zip(*(t.tensor_split(pieces) for t in given), strict=True):
                indices = None if self.explained.indices is None else self.explained.indices[row]
                tape = self.passes.plain(part) if gradient else None
                output = self.passes.returned(tape.output, len(part)) if tape else self.passes.outputs(part)
                with self.passes.autocast():
                    score = self.settings.target.score(output, indices, unit).gather(1, column[:, None])[:, 0]
                scores.append(score.detach().to(versions.dtype))
                if tape:
                    gradients.append(tape.replay(score, [tape.images], keep=False)[0])
                self.settings.progress(len(part))
            back = slice(None) if order is None else order.argsort()
            return torch.cat(scores)[back], torch.cat(gradients)[back] if gradient else None

        result, self.per_pass = backing_off(self.per_pass, work)
        return result

    def _zeros(self) -> Tensor:
        images = self.samples.images
        return images.new_zeros((len(images), self.explained.scores.shape[1], *images.shape[1:]))


def noise_key(samples: int, noise: float) -> tuple[object, ...]:
    """What methods that need `noise_moments` name in `Method.asks`."""
    return ("noise", samples, noise)


def _steps(nodes: Tensor, like: Tensor) -> Tensor:
    return nodes.view(-1, *(1,) * like.dim())

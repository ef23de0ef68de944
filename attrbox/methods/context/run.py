"""A run: one chunk of images under one model, and all that methods may want to know about it, computed once.

Every quantity is kept under its arguments, so two methods that ask for the same one share its passes through the
model: one recorded forward serves all rules, one set of noise samples the whole SmoothGrad family. What is asked for
with other arguments is computed anew, and nothing is computed that nobody asks for.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from attrbox.core.options import identity
from attrbox.core.outputs import Outputs
from attrbox.engine.site import Rule
from attrbox.engine.site_function import Reference
from attrbox.engine.tape import Tape
from attrbox.errors import ModelError, PartialMapWarning, UnsupportedModelError
from attrbox.methods.context.passes import Once, Passes, Samples, Settings, in_channels_last
from attrbox.methods.context.versions import Explained, Versions


@dataclass(eq=False)
class _Recorded:
    """The recorded pass of the images and what hangs on it; all of it is forgotten together.

    Attributes:
        output: what the model returned.
        references: recorded passes of baselines.
        spent: whether the last declared replay has freed the activations.
    """

    tape: Tape
    output: Outputs
    references: dict[object, Reference] = field(default_factory=dict)
    spent: bool = False


class Run:
    """One chunk. Methods call its functions; the planner makes it and throws it away.

    Attributes:
        model: in evaluation mode.
        images: [n, ...].
        settings: what holds for the whole call.
        rows: which of the call's images these are.
        samples: the images with their random numbers and baselines.
        passes: the ways in which the model is run.
        once: keeps what is computed for one method and may serve another.
        replayed: the rules that the method of the moment asked for.
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
        """`rules`, `layers` and `asked` (other quantities) are those that methods will ask for. Without `keep` it is
        one rule or layer, once: so the recorded activations can be freed while it is replayed. A pass takes `per_pass`
        images."""
        self.model = model
        self.images = images
        self.settings = settings
        self.rows = rows
        self.samples = Samples(images, rows, settings.seeds[rows], settings.target.samples)
        self.passes = Passes(model, images[:1], settings.precision, settings.channels_last)
        self.once = Once()
        self.replayed: list[Rule] = []
        self._per_pass = per_pass
        self._rules = list(rules)
        self._layers = list(layers)
        self._keep = keep
        self._asked = asked
        self._taped = bool(rules or layers)
        self._maps: int | None = None  # how many feature maps to follow, where the last is not on the way to the scores
        self._recorded: _Recorded | None = None
        self._details: dict[str, Any] = {}

    @cached_property
    def versions(self) -> Versions:
        """Passes over many versions of each image."""
        return Versions(self.settings, self.samples, self.passes, self.explained, self._per_pass, self._asked)

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

    # ------------------------------------------------------------------------------------------------ the recorded pass

    @property
    def tape(self) -> Tape:
        """The recorded forward pass of the images."""
        return self._recording.tape

    @property
    def _recording(self) -> _Recorded:
        if self._recorded is None:
            tape = self.passes.recorded(self.images, self._rules, self._layers, self._maps)
            self._recorded = _Recorded(tape, self.passes.returned(tape.output, len(self.images)))
        return self._recorded

    def _serve(self, rule: Rule | None = None, layers: Sequence[str | None] = ()) -> Tape:
        """The recorded pass, recorded again if it cannot serve these: where a method did not declare what it asks for,
        or its activations are freed. So a map depends neither on the declaration nor on the methods beside it."""
        missing = [layer for layer in layers if layer not in self._layers]
        known = rule is None or any(rule == other for other in self._rules) or self.tape.serves(rule)
        if missing or not known or (self._recorded is not None and self._recorded.spent):
            self.release()
            self._rules += [] if known else [rule]
            self._layers += missing
            self._keep = True
        return self.tape

    def release(self) -> None:
        """Forget the recorded pass; what it told of the scores is kept, for other methods need it."""
        _ = self.explained
        self._recorded = None

    @cached_property
    def explained(self) -> Explained:
        """The explained scores and classes."""
        if self._taped:
            output = self._recording.output
        else:  # nobody replays anything at the images themselves
            with torch.no_grad():
                output = self.bare_forward()
        target = self.settings.target
        indices = target.resolve(output, self.rows)
        scores = target.score(output, indices).detach().to(self.images.dtype)
        return Explained(scores, indices, output.predicted)

    @property
    def scores(self) -> Tensor:
        """The explained scores of the images, [n, K], without gradient."""
        return self.explained.scores

    @property
    def indices(self) -> Tensor | None:
        """The explained class indices, [n, K]; None for a target function."""
        return self.explained.indices

    @property
    def predictions(self) -> Tensor | None:
        """The class of the largest output, [n]; None if the outputs are not [n, classes]."""
        return self.explained.predictions

    def score(self, tape: Tape) -> Tensor:
        """The explained scores in a pass of the images, [n, K], with their graph."""
        return self.settings.target.score(self.passes.returned(tape.output, len(self.images)), self.indices)

    def scores_in(self, unit: str) -> Tensor:
        """The same in a unit (`attrbox.core.targets.UNITS`), [n, K], of the kind of pass that masked images take; one
        more pass unless it is "logit" and that kind is the recorded one's."""

        def compute() -> Tensor:
            scores = self.settings.target.score(self.passes.outputs(self.images), self.indices, unit)
            return scores.to(self.images.dtype)

        recorded = unit == "logit" and self.settings.precision != torch.float16
        return self.scores if recorded else self.once(("scored", unit), compute)

    def bare_forward(self) -> Outputs:
        """The model's outputs with nothing recorded.

        Raises:
            ModelError, TargetError: they have not one row, or score, for each image.
        """
        output = self.passes.unrecorded(self.images)
        self.settings.target.check_rows(output)
        return output

    def _scores(self) -> Tensor:
        """The explained scores, [n, K], with the graph of the recorded pass."""
        return self.settings.target.score(self._recording.output, self.indices)

    def _replay(self, inputs: Tensor, rule: Rule | None = None, reference: Reference | None = None) -> Tensor:
        """The gradient of each score with respect to `inputs`, [n, K, ...]."""
        scores, recording = self._scores(), self._recording
        count = scores.shape[1]
        with self.passes.autocast_recorded():
            gradients = [
                recording.tape.replay(
                    scores[:, k], [inputs], rule, reference=reference, keep=self._keep or k + 1 < count
                )[0]
                for k in range(count)
            ]
        recording.spent = not self._keep
        return torch.stack(gradients, 1).to(self.images.dtype)

    def gradient(self, rule: Rule | None = None, baseline: float | Tensor = 0.0) -> Tensor:
        """Gradient of each score with respect to the images, propagated by `rule`, [n, K, C, H, W].

        Args:
            rule: None for the true gradient.
            baseline: what a rule that uses a reference compares with.
        """
        uses_reference = rule is not None and rule.uses_reference
        key = ("gradient", rule, identity(baseline) if uses_reference else None)
        self.replayed += [] if rule is None else [rule]

        def compute() -> Tensor:
            tape = self._serve(rule)
            reference = self.reference(baseline) if uses_reference else None
            return self._replay(tape.images, rule, reference)

        return self.once(key, compute)

    def gradient_of_one(self, row: int, column: int, rule: Rule) -> Tensor:
        """The gradient of one score of one image with respect to that image, propagated by `rule`, [C, H, W]."""
        self.replayed.append(rule)
        tape = self._serve(rule)
        with self.passes.autocast_recorded():
            return tape.replay(self._scores()[row, column], [tape.images], rule)[0][row].to(self.images.dtype)

    def feature_map(self, layer: str | None) -> tuple[Tensor, Tensor]:
        """A layer's output [n, C, ...], and the gradient of each score with respect to it, [n, K, C, ...]."""

        def compute() -> tuple[Tensor, Tensor]:
            tape = self._serve(layers=[layer])
            if layer is None and self._maps is None:
                self._maps = tape.maps_on_the_way(self._scores().unbind(1))
                if self._maps is not None:
                    self.release()
                    tape = self.tape
            features, grid = tape.feature_maps[layer], tape.grids[layer]
            rows = len(features)
            if rows != len(self.images) or (rows > 1 and not tape.rows_are_images(layer)):
                return self._maps_one_by_one(layer, rows)
            gradient = self._replay(features)
            spatial = grid.spatial(gradient.flatten(0, 1))
            return (
                grid.spatial(features.detach()).to(self.images.dtype),
                spatial.reshape(*gradient.shape[:2], *spatial.shape[1:]),
            )

        return self.once(("feature_map", layer), compute)

    def feature_maps(self, layer: str | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The feature maps that explain the scores: of each the features [n, C, ...], the gradients [n, K, C, ...], and
        for which scores it counts, [n, K].

        There is one, but where a model joins heads to one output: there the last map says nothing about the scores of
        the other heads, and each score gets the last one that does.
        """
        features, gradient = self.feature_map(layer)
        counts = (gradient != 0).flatten(2).any(2)
        everywhere = torch.ones_like(counts)
        alone = [(features, gradient, everywhere)]
        if layer is not None or len(self.tape.feature_maps[layer]) != len(self.images):  # several rows per image
            return alone
        if not self.tape.has_ways_around(self._scores().unbind(1)) or counts.is_meta:
            return alone
        tape = self._serve(layers=[None])
        with self.passes.autocast():
            scores = self._scores().unbind(1)
            if bool(counts.all()):
                if tape.has_other_branches(scores):
                    warnings.warn(_PARTIAL, PartialMapWarning, stacklevel=2)
                return alone
            places = torch.stack([tape.last_map_with_gradient(score) for score in scores], 1)
        places = places.masked_fill(counts, 0)
        found = [(features, gradient, places == 0)]  # those without any gradient too
        for place in sorted(set(places.flatten().tolist()) - {0}):
            run = Run(self.model, self.images, self.settings, self.rows, self._per_pass, [], [None])
            run._maps = place
            found.append((*run.feature_map(None), places == place))
        return found

    def one_by_one(self, layers: Sequence[str | None] = ()) -> list["Run"]:
        """Each image as a chunk of its own, for models whose rows take ways of their own."""
        first = self.rows.start
        return [
            Run(self.model, image, self.settings, slice(first + i, first + i + 1), 1, [], layers)
            for i, image in enumerate(torch.split(self.images, 1))
        ]

    def _maps_one_by_one(self, layer: str | None, rows: int) -> tuple[Tensor, Tensor]:
        """The feature maps of a model that runs its layers row by row, image by image.

        Raises:
            UnsupportedModelError: it lays several views of an image into the batch axis.
        """
        n = len(self.images)
        if n == 1:
            raise UnsupportedModelError(
                f"The layer {layer or '(the last feature map)'!r} has {rows} rows for one image: the model lays crops, "
                "views or windows of it into the batch axis, so there is no one map over the image. Name a layer that "
                "has one row per image, layer=..., or use a method without layers."
            )
        alone = self.one_by_one([layer])
        for one in alone:
            one._maps = self._maps
        parts = [one.feature_map(layer) for one in alone]
        return torch.cat([features for features, _ in parts]), torch.cat([gradient for _, gradient in parts])

    def reference(self, baseline: float | Tensor) -> Reference:
        """The recorded forward pass of a baseline."""

        recording, key = self._recording, identity(baseline)
        if key not in recording.references:
            with self.passes.autocast_recorded():
                recording.references[key] = recording.tape.record_reference(self.samples.baseline(baseline))
        return recording.references[key]

    def baseline_scores(self, baseline: float | Tensor) -> Tensor:
        """The explained scores at the baseline, [n, K]."""

        @torch.no_grad()
        def compute() -> Tensor:
            images = self.samples.baseline(baseline)
            each = images.expand_as(self.images)
            reference = self._recorded.references.get(identity(baseline)) if self._recorded else None
            try:
                if self.indices is None:  # a function, which may have something of its own for each image
                    output = self.passes.unrecorded(each)
                elif reference is not None:
                    output = self.passes.returned(reference.output, reference.count)
                else:
                    output = self.passes.unrecorded(images)
                if output.count < len(each):
                    scores = output.scores
                    output = self.passes.returned(scores.expand(len(each), *scores.shape[1:]), len(each))
            except ModelError:  # the model may take batches of one size only
                if len(images) == len(each):
                    raise
                output = self.passes.unrecorded(each)
            return self.settings.target.score(output, self.indices).detach().to(self.images.dtype)

        return self.once(("baseline_scores", identity(baseline)), compute)

    def recording(self, rule: Rule, key: object) -> Tape:
        """A recorded pass of its own for a rule whose replays are differentiated; one for all with the same `key`.

        Always in the memory format channels_last, whatever the call says and the images are: iterations amplify the
        rounding in which formats differ, and a map must not depend on an option for speed.
        """

        images = in_channels_last(self.images)
        return self.once(("recording", key), lambda: self.passes.recorded(images, [rule], twice=True))


_PARTIAL = (
    "The scores come from other feature maps too, which do not lead to the last one (several networks or heads in one "
    "model), so its map shows a part of the model only. Name a layer that all goes through (layer=...), explain the "
    "parts one by one, or use a method without layers."
)

"""One recorded forward pass of a chunk: the explained scores, and gradients propagated by rules."""

from collections.abc import Collection, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from attrbox.core.options import identity
from attrbox.core.outputs import Outputs
from attrbox.engine.calling import forward
from attrbox.engine.site import Rule
from attrbox.engine.site_function import Reference
from attrbox.engine.tape import Tape, record
from attrbox.errors import ModelError, UnsupportedModelError
from attrbox.methods.context.chunk import Chunk, Settings, in_channels_last


class Recorded(Chunk):
    """A chunk with its tape.

    `rules`, `layers` and `asked` (other quantities) are those that methods will ask for. Without `keep` it is
    one rule or layer, once: so the recorded activations can be freed while it is replayed.
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
        super().__init__(model, images, settings, rows, per_pass)
        self._rules = list(rules)
        self._layers = list(layers)
        self._maps: int | None = None  # how many feature maps to follow, where the last is not on the way to the scores
        self._spent = False  # whether the last declared replay has freed the tape's activations
        self.replayed: list[Rule] = []  # what the method of the moment asked for
        self._taped = bool(rules or layers)
        self._keep = keep
        self._asked = asked

    @property
    def tape(self) -> Tape:
        """The recorded forward pass of the images."""

        def compute() -> Tape:
            with self.autocast_recorded():
                return record(self.model, self.images, self._rules, self._layers, maps=self._maps)

        return self.once(("tape",), compute)

    def _serve(self, rule: Rule | None = None, layers: Sequence[str | None] = ()) -> Tape:
        """The recorded pass, recorded again if it cannot serve these: where a method did not declare what it asks for,
        or its activations are freed. So a map depends neither on the declaration nor on the methods beside it."""
        missing = [layer for layer in layers if layer not in self._layers]
        known = rule is None or any(rule == other for other in self._rules) or self.tape.serves(rule)
        if self._spent or missing or not known:
            self._forget()
            self._rules += [] if known else [rule]
            self._layers += missing
            self._spent, self._keep = False, True
        return self.tape

    def _forget(self) -> None:
        self._scored()  # outlives the tape, as the path and noise methods need the targets
        self._cache = {
            key: value for key, value in self._cache.items() if key[0] not in ("tape", "output", "reference")
        }

    def release(self) -> None:
        """Forget the recorded pass, once the methods that replay it are done."""
        self._forget()
        self._spent = False

    @property
    def scores(self) -> Tensor:
        """The explained scores of the images, [n, K], without gradient."""
        return self._scored()[0]

    def scores_in(self, unit: str) -> Tensor:
        """The same in a unit (`attrbox.core.targets.UNITS`), [n, K], of the kind of pass that masked images take; one
        more pass unless it is "logit" and that kind is the recorded one's."""

        def compute() -> Tensor:
            return self.settings.target.score(self.bare(self.images), self.indices, unit).to(self.images.dtype)

        recorded = unit == "logit" and self.settings.precision != torch.float16
        return self.scores if recorded else self.once(("scored", unit), compute)

    @property
    def indices(self) -> Tensor | None:
        """The explained class indices, [n, K]; None for a target function."""
        return self._scored()[1]

    @property
    def predictions(self) -> Tensor | None:
        """The class of the largest output, [n]; None if the outputs are not [n, classes]."""
        return self._scored()[2]

    def bare_forward(self) -> Outputs:
        """The model's outputs with nothing recorded.

        Raises:
            ModelError, TargetError: they have not one row, or score, for each image.
        """
        output = self._untaped(self.images)
        self.settings.target.check_rows(output)
        return output

    def _untaped(self, images: Tensor) -> Outputs:
        with self.autocast_recorded():
            return self.returned(forward(self.model, images.clone()), len(images))

    def _scored(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        def compute() -> tuple[Tensor, Tensor | None, Tensor | None]:
            if self._taped:
                output = self._output()
            else:  # nobody replays anything at the images themselves
                with torch.no_grad():
                    output = self.bare_forward()
            indices = self.settings.target.resolve(output, self.rows)
            scores = self.settings.target.score(output, indices).detach().to(self.images.dtype)
            return scores, indices, output.predicted

        return self.once(("scored",), compute)

    def _output(self) -> Outputs:
        return self.once(("output",), lambda: self.returned(self.tape.output))

    def _replay(self, inputs: Tensor, rule: Rule | None = None, reference: Reference | None = None) -> Tensor:
        """The gradient of each score with respect to `inputs`, [n, K, ...]."""
        scores = self.settings.target.score(self._output(), self.indices)
        count = scores.shape[1]
        with self.autocast_recorded():
            gradients = [
                self.tape.replay(scores[:, k], [inputs], rule, reference=reference, keep=self._keep or k + 1 < count)[0]
                for k in range(count)
            ]
        self._spent = not self._keep
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
            self._serve(rule)
            reference = self.reference(baseline) if uses_reference else None
            return self._replay(self.tape.images, rule, reference)

        return self.once(key, compute)

    def gradient_of_one(self, row: int, column: int, rule: Rule) -> Tensor:
        """The gradient of one score of one image with respect to that image, propagated by `rule`, [C, H, W]."""
        self.replayed.append(rule)
        self._serve(rule)
        with self.autocast_recorded():
            score = self.settings.target.score(self._output(), self.indices)[row, column]
            return self.tape.replay(score, [self.tape.images], rule)[0][row].to(self.images.dtype)

    def feature_map(self, layer: str | None) -> tuple[Tensor, Tensor]:
        """A layer's output [n, C, ...], and the gradient of each score with respect to it, [n, K, C, ...]."""

        def compute() -> tuple[Tensor, Tensor]:
            tape = self._serve(layers=[layer])
            if layer is None and self._maps is None:
                scores = self.settings.target.score(self._output(), self.indices)
                self._maps = tape.maps_on_the_way(scores.unbind(1))
                if self._maps is not None:
                    self._forget()
                    tape = self.tape
            features, grid = tape.feature_maps[layer], tape.grids[layer]
            if len(features) != len(self.images):
                return self._maps_one_by_one(layer, len(features))
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
        scores = self.settings.target.score(self._output(), self.indices)
        if not self.tape.has_ways_around(scores.unbind(1)) or counts.is_meta or bool(counts.all()):
            return alone
        tape = self._serve(layers=[None])
        with self.autocast():
            scores = self.settings.target.score(self._output(), self.indices)
            places = torch.stack([tape.last_map_with_gradient(score) for score in scores.unbind(1)], 1)
        places = places.masked_fill(counts, 0)
        found = [(features, gradient, places == 0)]  # those without any gradient too
        for place in sorted(set(places.flatten().tolist()) - {0}):
            run = type(self)(self.model, self.images, self.settings, self.rows, self.per_pass, [], [None])
            run._maps = place
            found.append((*run.feature_map(None), places == place))
        return found

    def one_by_one(self, layers: Sequence[str | None] = ()) -> list[Self]:
        """Each image as a chunk of its own, for models whose rows take ways of their own."""
        first = self.rows.start
        return [
            type(self)(self.model, image, self.settings, slice(first + i, first + i + 1), 1, [], layers)
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
        parts = [one.feature_map(layer) for one in self.one_by_one([layer])]
        return torch.cat([features for features, _ in parts]), torch.cat([gradient for _, gradient in parts])

    def reference(self, baseline: float | Tensor) -> Reference:
        """The recorded forward pass of a baseline."""

        def compute() -> Reference:
            with self.autocast_recorded():
                return self.tape.record_reference(self.baseline(baseline))

        return self.once(("reference", identity(baseline)), compute)

    def baseline_scores(self, baseline: float | Tensor) -> Tensor:
        """The explained scores at the baseline, [n, K]."""

        @torch.no_grad()
        def compute() -> Tensor:
            images = self.baseline(baseline)
            each = images.expand_as(self.images)
            reference = self._cache.get(("reference", identity(baseline)))
            try:
                if self.indices is None:  # a function, which may have something of its own for each image
                    output = self._untaped(each)
                elif isinstance(reference, Reference):
                    output = self.returned(reference.output, reference.count)
                else:
                    output = self._untaped(images)
                if output.count < len(each):
                    scores = output.scores
                    output = self.returned(scores.expand(len(each), *scores.shape[1:]))
            except ModelError:  # the model may take batches of one size only
                if len(images) == len(each):
                    raise
                output = self._untaped(each)
            return self.settings.target.score(output, self.indices).detach().to(self.images.dtype)

        return self.once(("baseline_scores", identity(baseline)), compute)

    def recording(self, rule: Rule, key: object) -> Tape:
        """A recorded pass of its own for a rule whose replays are differentiated; one for all with the same `key`.

        Always in the memory format channels_last, whatever the call says and the images are: iterations amplify the
        rounding in which formats differ, and a map must not depend on an option for speed.
        """

        def compute() -> Tape:
            with self.autocast_recorded():
                return record(self.model, in_channels_last(self.images), [rule], twice=True)

        return self.once(("recording", key), compute)

"""The tape: a forward pass recorded once, replayed backward under any number of rules."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from attrbox.core.model_state import autocasting, wide
from attrbox.core.outputs import mapped, tensors
from attrbox.core.results import Coverage, Operated
from attrbox.engine.autograd_graph import (
    behind,
    between,
    last_on_the_way,
    made_into,
    on_the_way,
    pixel_by_pixel,
    ways_around,
)
from attrbox.engine.calling import forward, hidden_by
from attrbox.engine.feature_maps import Grid
from attrbox.engine.recorder import Recorder
from attrbox.engine.refusals import checkpointed, written_over
from attrbox.engine.site import LAYERS, PoolInfo, Rule, Site, asked
from attrbox.engine.site_function import Reference, Replaying
from attrbox.errors import ForwardError, ModelError, NoGradientError, RuleError, UnsupportedModelError


class Tape:
    """One recorded forward pass. `replay` may be called any number of times.

    Attributes:
        images: the leaf that the gradients are taken with respect to, [n, ...].
        output: whatever the model returned.
        sites: the recorded sites in order of execution (without activations).
        passed: operations of the table that no rule of the recording covers: native, with their true derivative.
        unknown: non-linear operations that are not in the table, native too.
        feature_maps: layer name (or None: the last spatial feature map) -> its output.
        grids: the same names -> where in these outputs the pixels are.
        entrance: what the first layers that rules treat get, where the model normalizes pixels itself, and its slope.
    """

    def __init__(self, model: nn.Module, images: Tensor, output: Any, recorder: "Recorder | None") -> None:
        self.model = model
        self.images = images
        self.output = output
        self.sites: tuple[Site, ...] = tuple(recorder.sites) if recorder else ()
        self.passed: tuple[Operated, ...] = tuple(recorder.passed) if recorder else ()
        self.unknown: tuple[Operated, ...] = tuple(recorder.unknown) if recorder else ()
        self._layers = recorder.layer_nodes if recorder else []
        self._nodes = recorder.site_nodes if recorder else {}
        self.feature_maps: dict[str | None, Tensor] = recorder.feature_maps if recorder else {}
        self.grids: dict[str | None, Grid] = recorder.grids if recorder else {}
        self._has_rows = recorder.has_rows if recorder else {}
        self._map_edges = recorder.map_edges if recorder else []
        self._map_grids = recorder.map_grids if recorder else []
        self._by_row = recorder is not None and recorder.by_row
        self._needs = recorder.needs if recorder else {}
        self._replaying = recorder.replaying if recorder else Replaying()
        self._narrow = autocasting(images.device) == torch.float16
        self.entrance = None if recorder is None else _entrance(images, recorder.entrances)

    @property
    def layers(self) -> int:
        """How many convolutions and linear layers ran."""
        return len(self._layers)

    def between_layers(self, with_positions: bool) -> set[int]:
        """Numbers of the sites between two layers, whichever way the graph takes from one to the other.

        Args:
            with_positions: count convolutions, and linear layers on tokens, alone.
        """
        layers = [node for node, positions in self._layers if positions or not with_positions]
        return between(tensors(self.output), self._nodes, layers)

    def rows_are_images(self, place: int | str | None) -> bool:
        """Whether row i of an activation is image i, at a site, by its number, or at a layer with a feature map."""
        return self._has_rows.get(place, False)

    def maps_on_the_way(self, scores: Sequence[Tensor]) -> int | None:
        """How many spatial feature maps to follow so that the last one lies on the way to all of these scores, and is
        not itself what the model returns; None if all, as where the model classifies and has no other heads."""
        wanted = last_on_the_way(self._map_edges, scores, made_into(tensors(self.output)))
        return None if wanted == len(self._map_edges) else wanted

    def has_ways_around(self, scores: Sequence[Tensor]) -> bool:
        """Whether a score comes from an earlier spatial feature map by another way than through the last."""
        return any(ways_around(self._map_edges, score) for score in scores)

    def has_other_branches(self, scores: Sequence[Tensor]) -> bool:
        """Whether a score changes with spatial feature maps that do not lead to the last one."""
        inside = behind(self._map_edges[-1].node)
        for score in scores:
            found = (self._map_edges[place - 1] for place in on_the_way(self._map_edges, score))
            edges = [edge for edge in found if edge.node not in inside]
            if edges and any(bool(gradient.any()) for gradient in self.replay(score, edges)):
                return True
        return False

    def last_map_with_gradient(self, score: Tensor) -> Tensor:
        """The number, from 1, of the last spatial feature map at which each image's score has a gradient other than 0;
        0 if there is none, [n]."""
        found = torch.zeros(len(self.images), dtype=torch.int64, device=self.images.device)
        places = on_the_way(self._map_edges, score)
        for place, gradient in zip(places, self.replay(score, [self._map_edges[p - 1] for p in places]), strict=True):
            if len(gradient) == len(found):
                positions = self._map_grids[place - 1].spatial(gradient)  # without a class token
                found = torch.where((positions != 0).flatten(1).any(1), place, found)
        return found

    def serves(self, rule: Rule | None) -> bool:
        """Whether all that the rule reads was kept, so that it can be replayed."""
        wanted = {} if rule is None else _needs([rule])
        return all(needs <= self._needs.get(kind, frozenset()) for kind, needs in wanted.items())

    def record_reference(self, reference: Tensor) -> Reference:
        """Forward a reference (batch of 1 for a shared one, or of n) and keep its activations at the sites.

        Raises:
            ModelError: the model takes another path on the reference than on the images.
        """
        each = reference.expand(len(self.images), *reference.shape[1:])
        reference = each if self._by_row and len(reference) == 1 else reference
        try:
            recorder, output = self._forward_reference(reference)
            if len(reference) < len(each) and len(recorder.sites) != len(self.sites):  # it may loop over its rows
                reference = each
                recorder, output = self._forward_reference(each)
        except ForwardError:  # it may take batches of one size only
            if len(reference) == len(each):
                raise
            reference = each
            recorder, output = self._forward_reference(each)
        there, here = Operated.listed(recorder.sites), Operated.listed(self.sites)
        if there != here:
            first = next(
                (pair for pair in zip(here, there, strict=False) if pair[0] != pair[1]), ("another number", "them")
            )
            raise ModelError(
                f"The model ran {len(here)} non-linear operations on the images but {len(there)} (or other ones) on "
                f"the reference; the first difference is {first[0]} against {first[1]}. Its control flow depends on "
                "its input, so differences from this reference are not defined. Choose a baseline that takes the same "
                "path, or a method without one."
            )
        if len(reference) == 1 and not all(map(_broadcasts, self.sites, recorder.kept)):
            # The model treats rows differently, or lays the batch and another axis together, such as windows: one
            # reference for each image.
            reference = each
            recorder, output = self._forward_reference(each)
        return Reference(tuple(recorder.kept), mapped(output, lambda tensor: tensor.detach()), len(reference))

    def _forward_reference(self, reference: Tensor) -> tuple[Recorder, Any]:
        copies: frozenset[int] = frozenset()
        while True:
            recorder = Recorder(self.model, self._needs, (), copies, reference=True)
            with torch.enable_grad():  # as for the images: what requires a gradient is an activation
                # A copy, as for the images: the model may write into it, which autograd forbids with a leaf.
                leaf = reference.detach().requires_grad_()
                output = forward(self.model, recorder.started(leaf), recorder.watching())
            recorder.passage.end()
            if not (stale := recorder.stale()):
                return recorder, output
            copies |= stale

    def replay(
        self,
        score: Tensor,
        inputs: Sequence[Tensor | GradientEdge],
        rule: Rule | None = None,
        *,
        reference: Reference | None = None,
        create_graph: bool = False,
        keep: bool = True,
    ) -> tuple[Tensor, ...]:
        """Gradients of `score.sum()` with respect to `inputs` (the images, a feature map, a stem), under `rule`.

        Args:
            score: a tensor computed from `output`.
            rule: None for the true gradient.
            reference: for rules that compare with one.
            keep: False for the last replay: activations are freed while it runs.
            create_graph: the gradients can be differentiated once more, also with respect to the rule's parameters.

        Raises:
            NoGradientError: the score does not depend on the inputs.
            RuleError: the rule broke its contract, or needs what was not kept for the rules of the recording.
            OptionError: the rule is not defined on this model.
        """
        if rule is not None and rule.uses_reference and reference is None:
            raise RuleError(f"The rule {type(rule).__name__} compares with a reference; pass one to replay.")
        if rule is not None:
            asked(rule, "asked whether it is defined on the model", partial(rule.check, self.sites))
        if not score.requires_grad:
            raise _no_gradient()
        self._replaying.rule, self._replaying.reference = rule, reference
        gradients: tuple[Tensor, ...]
        try:
            if self._narrow and not create_graph and rule is None:
                gradients = _scaled(score, inputs)
            else:
                gradients = torch.autograd.grad(
                    score.sum(), cast(Any, inputs), retain_graph=keep, create_graph=create_graph, allow_unused=True
                )
        except RuntimeError as error:
            if "use_reentrant" in str(error):  # its reentrant variant and autograd.grad
                raise checkpointed() from error
            if "modified by an inplace operation" in str(error):
                raise written_over(error) from error
            raise
        finally:
            self._replaying.rule = self._replaying.reference = None
        if any(gradient is None for gradient in gradients):
            raise _no_gradient()
        return gradients

    def coverage(self, rule: Rule | None) -> Coverage:
        """Which operations get the rule, which the true derivative."""
        treated = [
            rule is not None and asked(rule, f"asked whether it treats {site.where}", partial(rule.treats, site))
            for site in self.sites
        ]
        pairs = list(zip(self.sites, treated, strict=True))
        return Coverage(
            Operated.listed(site for site, by_rule in pairs if by_rule),
            Operated.listed(site for site, by_rule in pairs if not by_rule and site.kind not in LAYERS) + self.passed,
            self.unknown,
        )


def record(
    model: nn.Module,
    images: Tensor,
    rules: Collection[Rule | None] = (),
    layers: Collection[str | None] = (),
    twice: bool = False,
    maps: int | None = None,
) -> Tape:
    """Run `model` on `images` once, so that it can be replayed under each of `rules`.

    Without rules and layers nothing is intercepted and the forward pass is the native one.

    Args:
        model: the model, which gets a copy of the images, so that it may write into it.
        images: [n, ...], floating point.
        rules: the rules that will be replayed; they decide what is kept in memory. The true gradient (None) always can.
        layers: modules whose output is wanted in `feature_maps`; None means the last spatial feature map.
        twice: replays will be differentiated once more (`create_graph`), for the parameters of a rule: convolutions
            and linear layers are recorded so that this is cheap.
        maps: follow only so many spatial feature maps (`Tape.maps_on_the_way`); the last of them is the layer None.

    Raises:
        ForwardError: the model raised.
        UnsupportedModelError: rules or layers are asked for and the model is scripted, compiled or replicated.
        OptionError: no such layer, or it has no tensor as its output.
    """
    leaf = images.detach().requires_grad_()
    asking = [rule for rule in rules if rule is not None]
    if not asking and not layers:
        return Tape(model, leaf, forward(model, leaf.clone()), None)
    check_visible(model)
    needs = _needs(asking)
    copies: frozenset[int] = frozenset()
    while True:
        recorder = Recorder(model, needs, layers, copies, twice=twice, shape=images.shape, maps=maps)
        output = forward(model, recorder.started(leaf), recorder.watching())
        if not (stale := recorder.stale()):
            break
        recorder.passage.end()
        copies |= stale
    recorder.finish(output)
    return Tape(model, leaf, output, recorder)


def _entrance(images: Tensor, found: Sequence[tuple[Tensor, GradientEdge]]) -> tuple[Tensor, Tensor] | None:
    """What the first layers get, and its slope in the images, both laid out as the images.

    None if that is the images themselves, or if the model does more before them than normalize pixels or flip channels.
    """
    if len({edge.node for _, edge in found}) != 1:
        return None
    pixels, edge = found[0]
    if pixels.shape != images.shape or not pixel_by_pixel(edge.node):
        return None
    slope, sloped = (
        torch.autograd.grad(cast(Any, [edge]), [images], [weights], retain_graph=True)[0]
        for weights in (torch.ones_like(pixels), pixels)
    )
    return torch.where(slope == 0, 0, sloped / slope), slope


def check_visible(model: nn.Module) -> None:
    """Raise if parts of the model run where a function mode cannot see them.

    Raises:
        UnsupportedModelError: the model, or a part of it, is scripted, traced, compiled or a DataParallel.
    """
    for name, module in model.named_modules():
        state = "replicated by DataParallel" if isinstance(module, nn.DataParallel) else hidden_by(module)
        if state:
            where = f"Module {name!r}" if name else "The model"
            raise UnsupportedModelError(
                f"{where} is {state}, so its single operations cannot be seen and no propagation rule would reach "
                f"them. {_REMEDIES[state]}; saliency, integrated_gradients and the SmoothGrad family run on it as it "
                "is."
            )


_REMEDIES = {
    "scripted or traced": "Explain the model as it was before torch.jit.script or trace",
    "compiled": "Explain the original (compiled_model._orig_mod, or load it without compiling)",
    "replicated by DataParallel": "Explain its .module",
}


def _scaled(score: Tensor, inputs: Sequence[Tensor | GradientEdge]) -> tuple[Tensor, ...]:
    """Gradients in float32, taken through float16: of the score times the largest power of two that nothing overflows
    at, as small gradients are 0 there."""
    found: tuple[Tensor, ...] = ()
    for scale in _SCALES:
        seed = torch.full_like(score, scale)
        found = torch.autograd.grad(score, cast(Any, inputs), seed, retain_graph=True, allow_unused=True)
        found = tuple(None if gradient is None else wide(gradient) / scale for gradient in found)
        if all(gradient is None or bool(gradient.isfinite().all()) for gradient in found):
            break
    return found


_SCALES = (2.0**12, 2.0**6, 1.0, 2.0**-6, 2.0**-12)


def _broadcasts(site: Site, reference: tuple[Tensor, ...] | None) -> bool:
    """Whether what a reference left at a site stands for all images: its axes are the same, or 1."""
    return not (isinstance(site.info, PoolInfo) and site.info.by_row) and (
        reference is None
        or all(
            there.dim() == len(here)
            and all(size in (1, wanted) for size, wanted in zip(there.shape, here, strict=True))
            for there, here in zip(reference, site.shapes, strict=True)
        )
    )


def _needs(rules: Collection[Rule]) -> dict[str, frozenset[str]]:
    """What must be kept at each kind of site so that all of these, and the true gradient, can be replayed.

    The true gradient is what double backward comes through, whatever the rule.
    """
    needs: dict[str, frozenset[str]] = {}
    for kind in frozenset().union(*(rule.kinds for rule in rules)):
        needs[kind] = frozenset({"derivative"})
        for rule in rules:
            if kind in rule.kinds:
                needs[kind] |= asked(rule, f"asked what it needs at {kind}", partial(rule.needs_at, kind))
    return needs


def _no_gradient() -> NoGradientError:
    return NoGradientError(
        "The explained score does not depend on the images: no gradient path leads back to them. Look for a detach(), "
        "a torch.no_grad() or a conversion to numpy in the model, or an argmax in the target function."
    )

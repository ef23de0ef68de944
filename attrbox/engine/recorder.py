"""The recorder: watches a forward pass and turns operations into sites.

It runs the model under a `TorchFunctionMode`, which sees every torch function that the model calls, however it is
spelt. Each call that a rule may touch becomes a *site*: an `autograd.Function` that computes what the caller asked for
and whose backward asks the rule that is being replayed. Nothing is hooked onto or changed in the model, and a module
that runs five times is five sites.

In-place operations stay in place; where a rule reads the input, a copy of it is kept. If the model later writes over
an activation that a rule needs (which autograd's own formula would have allowed), `stale` names the site, and the pass
is recorded again with that activation copied.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from attrbox.core.outputs import described, tensors
from attrbox.core.results import Operated
from attrbox.engine.autograd_graph import last_of, mark_gate, node_of
from attrbox.engine.calling import has_own_hooks, is_checkpointing
from attrbox.engine.feature_maps import CONVOLUTIONS, Follower, Grid
from attrbox.engine.linear_maps import LinearCalls
from attrbox.engine.operations.batch_norm import batch_norm_of
from attrbox.engine.operations.calls import Operation, Parts, argument, flat, is_activation, name_of
from attrbox.engine.operations.layers import Pairs, layer_of, with_batch_norm
from attrbox.engine.operations.spelling import respelled
from attrbox.engine.operations.table import cuts, interpret, is_linear, parts_of
from attrbox.engine.passage import Passage
from attrbox.engine.refusals import batch_statistics, checkpointed, drawn_windows, no_feature_map
from attrbox.engine.running_modules import RunningModules
from attrbox.engine.site import ACTIVATIONS, GATES, LAYERS, Site
from attrbox.engine.site_function import Replaying, SiteFunction
from attrbox.errors import ModelError, OptionError, near_miss

R = TypeVar("R", Site, Operation)

# Linear layers, where only one of the factors depends on the images.
_LINEAR_LAYERS = frozenset({"linear", "matmul", "rmatmul", "addmm", "baddbmm", "bmm", "mm", "einsum"})


class Recorder(TorchFunctionMode):
    """Watches one forward pass: makes sites, notes what is not understood, keeps wanted feature maps."""

    def __init__(
        self,
        model: nn.Module,
        needs: dict[str, frozenset[str]],
        layers: Collection[str | None],
        copies: frozenset[int],
        reference: bool = False,
        twice: bool = False,
        shape: Sequence[int] = (1,),
        maps: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.passed: list[Operated] = []
        self.unknown: list[Operated] = []
        self._ungraded: list[Operated] = []  # what ran without gradients since the last operation with them
        self.needs = needs
        self.feature_maps: dict[str | None, Tensor] = {}
        self.grids: dict[str | None, Grid] = {}
        self._follower = Follower(shape, maps) if layers else None
        self._inside = 0  # of functions that are run part by part
        self.replaying = Replaying()
        self.passage = Passage()
        self.kept: list[tuple[Tensor, ...] | None] = []  # inputs at the sites, in a reference recording
        self.layer_nodes: list[tuple[Any, bool]] = []  # of convolutions and linear layers; whether these have positions
        self.site_nodes: dict[int, Any] = {}
        self.has_rows: dict[
            int | str | None, bool
        ] = {}  # whether row i is image i: sites, and layers with a feature map
        self.entrances: list[tuple[Tensor, GradientEdge]] = []  # inputs of the first layers
        self._last_counted: Tensor | None = None  # the output of the last of these layers
        self.by_row = False  # whether rows of the batch take ways of their own
        self._linear = LinearCalls() if twice else None
        self._made_layer = False  # whether the call that runs made one
        self._last_layer: tuple[Site, Operation, Tensor, int] | None = None  # with its output, and its version
        self._count = 0  # of sites
        self._pairs = None if LAYERS.isdisjoint(needs) else Pairs()
        self._copies = copies
        self._reference = reference
        self._versions: list[tuple[int, Tensor, int]] = []  # what must not be written over: site, tensor, version
        self._modules = RunningModules(model)

    @property
    def records(self) -> list[Site]:
        """What is known of the operations so far, in order."""
        return self.replaying.records

    @property
    def sites(self) -> list[Site]:
        """The last record of each site."""
        return list({site.index: site for site in self.records}.values())

    def stale(self) -> frozenset[int]:
        """Sites of which a kept activation has been written over since."""
        stale = frozenset(index for index, tensor, version in self._versions if tensor._version != version)
        self._versions.clear()
        if stale & self._copies:  # cannot happen: copies are out of the model's reach
            raise ModelError(
                f"The model writes over the activations at {[self.sites[i].where for i in sorted(stale)]}."
            )
        return stale

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function, kwargs = respelled(function, kwargs or {})
        args, kwargs = self._arriving(args, kwargs)
        if function is torch._pack_padded_sequence:  # of lengths that the images have
            self.by_row = True
        if torch.is_grad_enabled():
            self._made_layer = False
            result = self._run(function, args, kwargs)
            self.passage.made(result, function, args, kwargs, self._made_layer)
        else:
            before = len(self.unknown)
            result = function(*args, **kwargs)
            self._note(None, function, args, kwargs, result)
            self._ungraded.extend(self.unknown[before:])
            del self.unknown[before:]
        return result

    def _arriving(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments without gradients where they are constants; what went past the recorder since is noted.

        What ran without gradients is noted too, unless inside of an autograd function, which is noted as a whole.
        """
        args, kwargs, unseen = self.passage.arriving(args, kwargs)
        if torch.is_grad_enabled():
            if not any(unseen.values()):
                self.unknown.extend(self._ungraded)
            self._ungraded.clear()
        self.unknown.extend(map(self._modules.here, unseen))
        return args, kwargs

    def _run(self, function: Any, args: Any, kwargs: Any) -> Any:
        operation = interpret(function, args, kwargs)
        parts = parts_of(function, args, kwargs) if operation is None else None
        # Fused attention and recurrent kernels have no second derivative; their parts have.
        if parts is not None and (self._linear is not None or not self.needs.keys().isdisjoint(parts.kinds)):
            self._inside += 1
            with self:  # its parts come here one by one
                result = parts.run(*args, **kwargs)
            self._inside -= 1
            self._follow(function, result, args)
            return result
        layer = layer_of(function, args, kwargs) if operation is None and self._pairs else None
        before: int | None = None  # the layer whose output is the activation's input
        if operation is not None and operation.kind in self.needs:
            if self._pairs and operation.kind in ACTIVATIONS:
                before = self._pairs.layer_of(operation.inputs[0])
            result = self._keep(operation) if self._reference else self._make_site(operation)
        elif (joined := self._with_batch_norm(function, args, kwargs)) is not None:
            result = joined
        elif layer is not None and layer.kind in self.needs:
            result = self._make_layer(layer)
        else:
            result = self._linear.run(function, args, kwargs) if self._linear else None
            if result is None:
                result = function(*args, **kwargs)
            if not self._reference:
                self._note(operation or parts, function, args, kwargs, result)
        if is_activation(result) and operation is None:
            self._count_layer(name_of(function), args, kwargs, result)
        if operation is not None and operation.kind in GATES:
            mark_gate(result)
        if self._pairs and before is not None and operation is not None:
            self._pairs.pair(before, len(self.records) - 1, operation.inputs[0], result)
        elif self._pairs and is_activation(_first(result)):
            self._pairs.used(flat((*args, *kwargs.values())))
        self._follow(function, result, args)
        return result

    def _count_layer(self, name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        """Note a layer: a convolution, or a linear layer, whose output has positions if its channels are not all."""
        if name in CONVOLUTIONS or name in _LINEAR_LAYERS:
            self.layer_nodes.append((node_of(output), name in CONVOLUTIONS or sum(n > 1 for n in output.shape[1:]) > 1))
            self._last_counted = output
        elif name == "batch_norm" and self._last_counted is argument(args, kwargs, 0, "input", None):
            self.layer_nodes[-1] = (output.grad_fn, self.layer_nodes[-1][1])  # it may go around the layer's own node

    def _follow(self, function: Any, result: Any, args: Any) -> None:
        first = _first(result)
        if self._follower is not None and not self._inside and is_activation(first):
            self._follower.see(name_of(function), first, args)

    def _site(self, operation: Operation) -> Site:
        here = self._modules.here(operation.kind)
        what = operation.pure, operation.pull, operation.info, operation.floor
        shapes = tuple(i.shape for i in operation.inputs)
        site = Site(self._count, operation.kind, here.module, here.call, *what, shapes, here.repeat)
        self._count += 1
        self.records.append(site)
        self.has_rows[site.index] = self.passage.has_rows(operation.inputs[0])
        return site

    def _make_site(self, operation: Operation) -> Any:
        if is_checkpointing():
            raise checkpointed()
        return self._run_site(self._site(operation), operation)

    def _run_site(self, site: Site, operation: Operation) -> Any:
        needs = set(self.needs[operation.kind])
        if "input" not in needs:  # from the input everything else can be computed again
            needs.add(operation.pulls_from if operation.pull else "input")
        copying = site.index in self._copies
        inputs = operation.inputs
        if copying:  # the model writes over the input or the output later: keep both out of its reach
            inputs = tuple(i.clone() for i in inputs)
        copies = tuple(i.clone() for i in inputs) if operation.in_place and "input" in needs else ()
        result = SiteFunction.apply(self.replaying, len(self.records) - 1, operation, needs, *inputs, *copies)
        output = result[0] if isinstance(result, tuple) else result
        self.site_nodes[site.index] = node_of(output) if operation.in_place else output.grad_fn
        if copying:
            output = operation.inputs[0].copy_(output) if operation.in_place else output.clone()
            return (output, *result[1:]) if isinstance(result, tuple) else output
        if "output" in needs:
            self._watch(site, output)
        if "input" in needs and not copies:
            self._watch(site, *inputs)
        return result

    def _make_layer(self, layer: Operation) -> Any:
        x = layer.inputs[0]
        first = not self.passage.is_deep(x)
        layer = _knowing(layer, first=first)
        if first and not self._reference:
            self.entrances.append((x.detach().clone(), get_gradient_edge(x)))  # which the model may write over
        result = self._keep(layer) if self._reference else self._make_site(layer)
        output = _first(result)
        self._made_layer = True
        self._last_layer = (self.records[-1], layer, output, output._version)
        if self._pairs and not self._reference:
            self._pairs.made(output, len(self.records) - 1)
        return result

    def _with_batch_norm(self, function: Any, args: Any, kwargs: Any) -> Any:
        """The result of a batch-norm behind a layer, whose site it joins."""
        if self._last_layer is None or self._pairs is None:
            return None
        site, layer, output, version = self._last_layer
        joined = with_batch_norm(layer, output, function, args, kwargs)
        if joined is None or output._version != version or has_own_hooks(output):
            return None  # written over in between, or its gradient is looked at
        if self._reference:
            result = function(*args, **kwargs)
        else:
            site = replace(site, function=joined.pure, info=joined.info)
            self.records.append(site)
            result = self._run_site(site, joined)
            self._made_layer = True
            self._pairs.made(_first(result), len(self.records) - 1)
        self._last_layer = (site, joined, _first(result), _first(result)._version)
        return result

    def _keep(self, operation: Operation) -> Any:
        """Run an operation of a reference pass and keep its inputs, if a rule compares with them."""
        site = self._site(operation)
        if "reference" not in self.needs[operation.kind]:
            self.kept.append(None)
        else:
            inputs = operation.inputs
            if operation.in_place or site.index in self._copies:
                inputs = tuple(i.clone() for i in inputs)
            else:
                self._watch(site, *inputs)
            self.kept.append(tuple(i.detach() for i in inputs))
        return operation.run(*operation.inputs)

    def _watch(self, site: Site, *tensors: Tensor) -> None:
        self._versions.extend((site.index, tensor, tensor._version) for tensor in tensors)

    def _note(self, known: Operation | Parts | None, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Remember an operation that no rule touches, if it is not linear."""
        first = _first(result)
        if isinstance(known, Operation):
            self.passed.append(self._modules.here(known.kind))
            return
        if is_activation(first):
            norm = batch_norm_of(function, args, kwargs)
            if norm is not None and norm.trains and self.needs:
                raise batch_statistics(self._modules.current)
            if is_linear(function, args, kwargs) or (norm is not None and norm.linear):
                return
            if known is not None:
                self.passed.append(self._modules.here(known.kind))
                return
            if self.needs and name_of(function).startswith("fractional_max_pool"):
                raise drawn_windows(self._modules.current)
        elif not cuts(function, args, kwargs, first):
            return
        self.unknown.append(self._modules.here(name_of(function)))

    @property
    def map_edges(self) -> list[GradientEdge]:
        """See `Follower.edges`."""
        return self._follower.edges if self._follower is not None else []

    @property
    def map_grids(self) -> list[Grid]:
        """See `Follower.grids`."""
        return self._follower.grids if self._follower is not None else []

    def finish(self, output: Any) -> None:
        """After the forward pass: what went past the function mode, and layers that did not run.

        Raises:
            OptionError: a wanted layer does not exist, did not run, or has no feature map.
        """
        returned = list(tensors(output))
        self._arriving(tuple(returned), {})
        follower = self._follower
        if None in self.layers and follower is not None:
            if follower.last is not None:
                self.feature_maps[None], self.grids[None] = follower.last
                self.has_rows[None] = self.passage.has_rows(follower.last[0])
            elif any(operated.operation == "CheckpointFunction" for operated in self.unknown):
                raise checkpointed()
            else:
                raise no_feature_map(len(follower.size), follower.convolutions)
        for layer in self.layers:
            if layer is None or layer in self.feature_maps:
                continue
            near = [name for name in self._modules.names.values() if name]
            if layer not in near:
                raise OptionError(f"The model has no layer {layer!r}. {near_miss(layer, near)}")
            raise OptionError(f"The layer {layer!r} did not run, or its output depends not on the images.")
        if self._pairs:
            self._pairs.used(returned)
            self._complete_records(self._pairs.found)
        self.passage.end()

    def _complete_records(self, pairs: dict[int, int]) -> None:
        """Enter what is known at the end only: the last layers, and which layers and activations are pairs."""
        records = self.records
        for layer, activation in pairs.items():
            records[activation] = _knowing(records[activation], layer=records[layer].kind)
            records[layer] = _knowing(records[layer], activation=records[activation])
        places = {site.index: place for place, site in enumerate(records) if site.kind in LAYERS}  # the last records
        for index in last_of({index: self.site_nodes[index] for index in places}):
            records[places[index]] = _knowing(records[places[index]], last=True)

    # ------------------------------------------------------------------------------------------- module names

    def started(self, leaf: Tensor) -> Tensor:
        """The images that the model gets: a copy, as it may write into it."""
        images = leaf.clone()
        self.passage.begin(images)
        return images

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Intercept operations and follow which module is running; global hooks, gone again on exit."""
        enter = register_module_forward_pre_hook(lambda module, args: self._modules.enter(module))
        leave = register_module_forward_hook(self._leave_module, always_call=True)
        try:
            with self:
                yield
        except BaseException:
            self.passage.end()
            raise
        finally:
            enter.remove()
            leave.remove()

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> Any:
        del args
        name = self._modules.leave(module)
        if name and name in self.layers:
            if not isinstance(output, Tensor) or output.dim() < 3:
                what = described(output)
                raise OptionError(f"The layer {name!r} must return a feature map [N, C, ...], but returns {what}.")
            if is_activation(output):
                assert self._follower is not None
                self.feature_maps[name], self.has_rows[name] = output, self.passage.has_rows(output)
                self.grids[name] = self._follower.grid_of(output) or Grid(tuple(output.shape[2:]))
                # The model goes on with a copy: an in-place ReLU behind a convolution must not change the map.
                return output.clone()
        return None


def _knowing(record: R, **more: Any) -> R:
    """A record with more in its `info`."""
    return replace(record, info=replace(record.info, **more))


def _first(result: Any) -> Any:
    """What a function returned, or the first of several things."""
    return result[0] if isinstance(result, tuple | list) and result else result

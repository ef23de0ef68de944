"""The recorder: watches a forward pass and turns operations into sites.

It runs the model under a `TorchFunctionMode`, which sees every torch function that the model calls, however it is
spelt. Each call that a rule may touch becomes a *site*: an `autograd.Function` that computes what the caller asked for
and whose backward asks the rule that is being replayed. Nothing is hooked onto or changed in the model, and a module
that runs five times is five sites. This is the only file with function modes and autograd functions.

In-place operations stay in place; where a rule reads the input, a copy of it is kept. If the model later writes over
an activation that a rule needs (which autograd's own formula would have allowed), `stale` names the site, and the pass
is recorded again with that activation copied.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from attrbox.core.half_precision import HALF, wide
from attrbox.core.memory import is_out_of_memory
from attrbox.core.outputs import tensors
from attrbox.core.results import Operated
from attrbox.engine.batch_norm import batch_norm_of
from attrbox.engine.feature_maps import CONVOLUTIONS, Follower, Grid
from attrbox.engine.folding import Unfolded
from attrbox.engine.linear_maps import LinearCalls, own
from attrbox.engine.operations.decompositions import parts_of
from attrbox.engine.operations.layers import Pairs, layer_of, with_batch_norm
from attrbox.engine.operations.linearity import argument, flat, is_activation, is_decision, is_linear, name_of
from attrbox.engine.operations.operation import Operation, Parts
from attrbox.engine.operations.table import interpret
from attrbox.engine.site import ACTIVATIONS, LAYERS, Gradients, Rule, Site, asked
from attrbox.errors import (
    ForwardError,
    ModelError,
    OptionError,
    RuleError,
    UnsupportedModelError,
    near_miss,
)

# Linear layers, where only one of the factors depends on the images.
_LINEAR_LAYERS = frozenset({"linear", "matmul", "rmatmul", "addmm", "baddbmm", "bmm", "mm", "einsum"})
_OWN_FUNCTIONS = frozenset({"_SiteFunctionBackward", "LinearMapFunctionBackward"})


@dataclass(frozen=True)
class Reference:
    """What a reference forward pass left at each site, and what the model returned for `count` images."""

    inputs: tuple[tuple[Tensor, ...] | None, ...]
    output: Any
    count: int


class Replaying:
    """What the sites of one tape ask in a backward pass: the rule and the reference of the moment."""

    def __init__(self) -> None:
        self.rule: Rule | None = None
        self.reference: Reference | None = None

    def gradients(self, site: Site, inputs: Any, output: Tensor | None, shapes: list[Any], grad: Tensor) -> Any:
        """The gradients that a site passes on, one per input, of the inputs' shapes."""
        rule = self.rule
        if rule is not None and not asked(rule, f"asked whether it treats {site.where}", partial(rule.treats, site)):
            rule = None
        reference = self.reference.inputs[site.index] if self.reference else None
        site = site.with_tensors(inputs, output, reference, type(rule).__name__ if rule else "")
        if rule is None:
            found = site.true_gradient(grad)
        else:
            found = asked(rule, f"at {site.where}", partial(_in_float32, rule, site, grad))
        gradients = found if isinstance(found, tuple) else (found,)
        if len(gradients) != len(shapes) or not all(isinstance(gradient, Tensor) for gradient in gradients):
            raise RuleError(
                f"The rule {site.rule!r} must return {len(shapes)} gradient tensor(s) at {site.where}, got "
                f"{', '.join(type(gradient).__name__ for gradient in gradients)}."
            )
        if len(shapes) == 1 and gradients[0].shape != shapes[0]:
            raise RuleError(
                f"The rule {site.rule!r} must return a gradient of the input's shape {list(shapes[0])} at "
                f"{site.where}, got {list(gradients[0].shape)}."
            )
        if not all(map(_sums_to, gradients, shapes)):
            raise RuleError(
                f"The rule {site.rule!r} must return gradients of the inputs' shapes {list(map(list, shapes))}, or "
                f"that broadcast from these, at {site.where}, got {[list(gradient.shape) for gradient in gradients]}."
            )
        # A product may have broadcast a factor: its gradient is summed over the copies.
        return tuple(gradient.sum_to_size(shape) for gradient, shape in zip(gradients, shapes, strict=True))


def _sums_to(gradient: Tensor, shape: torch.Size) -> bool:
    """Whether it is of the shape, or broadcast from it."""
    sizes = gradient.shape[gradient.dim() - len(shape) :]
    return gradient.dim() >= len(shape) and all(to in (1, size) for size, to in zip(sizes, shape, strict=True))


def _in_float32(rule: Rule, site: Site, grad: Tensor) -> Gradients:
    """What the rule answers; where activations are in half precision, as under autocast, of float32 copies of them."""
    tensors = (site.saved_inputs, None if site.saved_output is None else (site.saved_output,), site.saved_reference)
    if not any(tensor.dtype in HALF for some in (*tensors, (grad,)) for tensor in some or ()):
        return _propagated(rule, site, grad)
    inputs, output, reference = (None if some is None else tuple(map(wide, some)) for some in tensors)
    site = site.with_tensors(inputs, output[0] if output else None, reference, site.rule)
    with torch.autocast(grad.device.type, enabled=False):
        return _propagated(rule, site, wide(grad))


def _propagated(rule: Rule, site: Site, grad: Tensor) -> Gradients:
    """What the rule answers, asked for a few samples at a time where the activation is large and on a CPU.

    A rule of several passes over memory has a result for each. Fresh pages for a large one cost a CPU more than the
    arithmetic; those of a few samples are used again, and stay in its cache.
    """
    rows = max(1, _BYTES_AT_ONCE * len(grad) // max(1, grad.numel() * grad.element_size()))
    whole = grad.device.type != "cpu" or torch.is_grad_enabled() or rows >= len(grad)
    if whole or not rule.by_rows or not site.splits_into_rows:
        return rule.propagate(site, grad)
    result = None
    for start in range(0, len(grad), rows):
        some = slice(start, start + rows)
        found = rule.propagate(site.rows(some), grad[some])
        if not isinstance(found, Tensor) or found.shape != grad[some].shape:
            return found  # a broken rule: the caller says so
        result = torch.empty_like(grad, dtype=found.dtype) if result is None else result
        result[some] = found
    assert result is not None
    return result


_BYTES_AT_ONCE = 8 * 2**20


class _SiteFunction(torch.autograd.Function):
    """Computes an operation as the model asked for it; its backward asks the rule of the moment."""

    @staticmethod
    def forward(ctx: Any, replaying: Replaying, site: Site, operation: Operation, needs: Any, *tensors: Tensor) -> Any:
        count = len(operation.inputs)
        inputs, copies = tensors[:count], tensors[count:]
        result = operation.run(*inputs)
        output = result[0] if isinstance(result, tuple) else result
        if operation.in_place:
            ctx.mark_dirty(inputs[0])
        elif isinstance(result, Tensor):
            result = output = own(result, *inputs)
        if isinstance(result, tuple):
            ctx.mark_non_differentiable(*result[1:])
        ctx.replaying, ctx.site = replaying, site
        ctx.shapes = [i.shape for i in inputs]
        ctx.unused = len(copies)
        ctx.kept = count if "input" in needs else 0
        ctx.save_for_backward(*((copies or inputs) if ctx.kept else ()), *((output,) if "output" in needs else ()))
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *indices: Any) -> Any:
        del indices
        saved = ctx.saved_tensors
        inputs = saved[: ctx.kept] if ctx.kept else None
        output = saved[ctx.kept] if len(saved) > ctx.kept else None
        gradients = ctx.replaying.gradients(ctx.site, inputs, output, ctx.shapes, grad_output)
        return (None, None, None, None, *gradients, *(None,) * ctx.unused)


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
        self.sites: list[Site] = []
        self.passed: list[Operated] = []
        self.unknown: list[Operated] = []
        self.needs = needs
        self.feature_maps: dict[str | None, Tensor] = {}
        self.grids: dict[str | None, Grid] = {}
        self._follower = Follower(shape, maps) if layers else None
        self._inside = 0  # of functions that are run part by part
        self.replaying = Replaying()
        self.kept: list[tuple[Tensor, ...] | None] = []  # inputs at the sites, in a reference recording
        self.layer_nodes: list[tuple[Any, bool]] = []  # of convolutions and linear layers; whether these have positions
        self.site_nodes: dict[int, Any] = {}
        self._last_counted: Tensor | None = None  # the output of the last of these layers
        self.by_row = False  # whether rows of the batch take ways of their own
        self._linear = LinearCalls() if twice else None
        self._treats_layers = not LAYERS.isdisjoint(needs)
        self._last_layer: tuple[Site, Operation, Tensor, int] | None = None  # with its output, and its version
        self._pairs = Pairs()
        self._copies = copies
        self._reference = reference
        self._versions: list[tuple[int, Tensor, int]] = []  # what must not be written over: site, tensor, version
        self._modules: list[tuple[str, int]] = [("", 0)]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._calls: Counter[str] = Counter()
        self._operations: Counter[tuple[str, str, int]] = Counter()  # how many ran so far: what, module, call
        self._thread = threading.get_ident()

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
        kwargs = kwargs or {}
        if function is torch._pack_padded_sequence:  # of lengths that the images have
            self.by_row = True
        operation = interpret(function, args, kwargs)
        parts = parts_of(function, args, kwargs) if operation is None else None
        # Fused attention and recurrent kernels have no second derivative; their parts have.
        if parts is not None and (self._linear is not None or not self.needs.keys().isdisjoint(parts.kinds)):
            self._inside += 1
            with self:  # its parts come here one by one
                result = parts.run(*args, **kwargs)
            self._inside -= 1
            self._follow(function, result)
            return result
        layer = layer_of(function, args, kwargs) if operation is None and self._treats_layers else None
        before: Site | None = None  # the layer whose output is the activation's input
        if operation is not None and operation.kind in self.needs:
            before = self._pairs.layer_of(operation.inputs[0]) if operation.kind in ACTIVATIONS else None
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
        if before is not None and operation is not None:
            self._pairs.pair(before, self.sites[-1], operation.inputs[0], result)
        elif self._treats_layers and is_activation(_first(result)):
            self._pairs.used(flat((*args, *kwargs.values())))
        self._follow(function, result)
        return result

    def _count_layer(self, name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        """Note a layer: a convolution, or a linear layer, whose output has positions if its channels are not all."""
        if name in CONVOLUTIONS or name in _LINEAR_LAYERS:
            self.layer_nodes.append((output.grad_fn, name in CONVOLUTIONS or output.dim() > 2))
            self._last_counted = output
        elif name == "batch_norm" and self._last_counted is argument(args, kwargs, 0, "input", None):
            self.layer_nodes[-1] = (output.grad_fn, self.layer_nodes[-1][1])  # it may go around the layer's own node

    def _follow(self, function: Any, result: Any) -> None:
        first = _first(result)
        if self._follower is not None and not self._inside and is_activation(first):
            self._follower.see(name_of(function), first)

    def _site(self, operation: Operation) -> Site:
        here = self._here(operation.kind)
        shapes = tuple(i.shape for i in operation.inputs)
        site = Site(
            len(self.sites),
            operation.kind,
            here.module,
            here.call,
            operation.pure,
            operation.pull,
            operation.options,
            shapes,
            here.repeat,
        )
        self.sites.append(site)
        return site

    def _here(self, operation: str) -> Operated:
        """An operation that runs now, numbered within the running module's call."""
        key = (operation, *self._modules[-1])
        self._operations[key] += 1
        return Operated(*key, self._operations[key] - 1)

    def _make_site(self, operation: Operation) -> Any:
        if _is_checkpointing():
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
        result = _SiteFunction.apply(self.replaying, site, operation, needs, *inputs, *copies)
        output = result[0] if isinstance(result, tuple) else result
        self.site_nodes[site.index] = output.grad_fn
        if copying:
            output = operation.inputs[0].copy_(output) if operation.in_place else output.clone()
            return (output, *result[1:]) if isinstance(result, tuple) else output
        if "output" in needs:
            self._watch(site, output)
        if "input" in needs and not copies:
            self._watch(site, *inputs)
        return result

    def _make_layer(self, layer: Operation) -> Any:
        layer.options["first"] = not any(site.kind in LAYERS for site in self.sites)
        result = self._keep(layer) if self._reference else self._make_site(layer)
        output = _first(result)
        self._last_layer = (self.sites[-1], layer, output, output._version)
        if not self._reference:
            self._pairs.made(output, self.sites[-1])
        return result

    def _with_batch_norm(self, function: Any, args: Any, kwargs: Any) -> Any:
        """The result of a batch-norm behind a layer, whose site it joins."""
        if self._last_layer is None:
            return None
        site, layer, output, version = self._last_layer
        joined = with_batch_norm(layer, output, function, args, kwargs)
        if joined is None or output._version != version:  # written over in between
            return None
        joined.options["first"] = layer.options["first"]
        if self._reference:
            result = function(*args, **kwargs)
        else:
            site = replace(site, function=joined.pure, options=joined.options)
            self.sites[site.index] = site
            result = self._run_site(site, joined)
            self._pairs.made(_first(result), site)
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
            self.passed.append(self._here(known.kind))
            return
        if is_activation(first):
            norm = batch_norm_of(function, args, kwargs)
            if norm is not None and norm.trains and self.needs:
                raise _batch_statistics(self.running)
            if is_linear(function, args, kwargs) or (norm is not None and norm.linear):
                return
            if known is not None:
                self.passed.append(self._here(known.kind))
                return
            if self.needs and name_of(function).startswith("fractional_max_pool"):
                raise _drawn_windows(self.running)
        elif not (isinstance(first, Tensor) and is_decision(function) and args and is_activation(args[0])):
            return
        self.unknown.append(self._here(name_of(function)))

    @property
    def map_edges(self) -> list[GradientEdge]:
        """See `Follower.edges`."""
        return self._follower.edges if self._follower is not None else []

    def finish(self, output: Any) -> None:
        """After the forward pass: what went past the function mode, and layers that did not run.

        Raises:
            OptionError: a wanted layer does not exist, did not run, or has no feature map.
        """
        returned = list(tensors(output))
        custom = _custom_functions(returned)
        last = self._follower.last if self._follower is not None else None
        if None in self.layers and last is not None:
            self.feature_maps[None], self.grids[None] = last
        for layer in self.layers:
            if layer in self.feature_maps:
                continue
            if layer is None:
                raise checkpointed() if "CheckpointFunction" in custom else self._no_map()
            near = [name for name in self._names.values() if name]
            if layer not in near:
                raise OptionError(f"The model has no layer {layer!r}. {near_miss(layer, near)}")
            raise OptionError(f"The layer {layer!r} did not run, or its output depends not on the images.")
        layers = [site for site in self.sites if site.kind in LAYERS]
        if layers:
            layers[-1].options["last"] = True
        self._pairs.used(returned)
        self.unknown.extend(map(self._here, custom))

    def _no_map(self) -> OptionError:
        """The refusal of models without a feature map, by what ran."""
        follower = self._follower
        assert follower is not None
        axes = len(follower.size)
        if not axes:
            why = "its inputs have no axes of pixels"
        elif follower.convolutions:
            why = f"{follower.convolutions} convolutions ran, but none with an output of {axes} axes of pixels"
        else:
            why = "neither a convolution nor a linear layer on square patches ran where the recorder sees it"
        return OptionError(
            f"The model has no spatial feature map: {why}. Grad-CAM needs one; name it by layer=..., or use another "
            "method."
        )

    # ------------------------------------------------------------------------------------------- module names

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Intercept operations and follow which module is running; global hooks, gone again on exit."""
        enter = register_module_forward_pre_hook(self._enter_module)
        leave = register_module_forward_hook(self._leave_module, always_call=True)
        try:
            with self:
                yield
        finally:
            enter.remove()
            leave.remove()

    def _name(self, module: nn.Module) -> str | None:
        return self._names.get(id(module)) if threading.get_ident() == self._thread else None

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        del args
        name = self._name(module)
        if name is not None:
            self._modules.append((name, self._calls[name]))
            self._calls[name] += 1

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> Any:
        del args
        name = self._name(module)
        if name is None:
            return None
        self._modules.pop()
        if name and name in self.layers:
            if not isinstance(output, Tensor) or output.dim() < 3:
                what = (
                    f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
                )
                raise OptionError(f"The layer {name!r} must return a feature map [N, C, ...], but returns {what}.")
            if is_activation(output):
                assert self._follower is not None
                self.feature_maps[name] = output
                self.grids[name] = self._follower.grid_of(output) or Grid(tuple(output.shape[2:]))
                # The model goes on with a copy: an in-place ReLU behind a convolution must not change the map.
                return output.clone()
        return None

    @property
    def running(self) -> str:
        """The module that is running, or that raised."""
        return self._modules[-1][0]


def forward(model: nn.Module, images: Tensor, recorder: Recorder | None = None) -> Any:
    """Call the model; whatever it raises becomes a `ForwardError` (out of memory stays what it is)."""
    watching = recorder.watching() if recorder else contextlib.nullcontext()
    try:
        with watching:
            return model(images)
    except (ModelError, OptionError, Unfolded):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "is a view and is being modified inplace" in str(error):
            raise written_over(error) from error
        raise ForwardError(
            f"The model raised {type(error).__name__} on images of shape {list(images.shape)}, {images.dtype}, on "
            f"{images.device}: {error}. Check that model(images) runs on its own (size, channels, dtype, device)."
        ) from error


def _is_checkpointing() -> bool:
    """Whether autograd forgets what is saved now, and will run the model's code again when it needs it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def checkpointed() -> UnsupportedModelError:
    """The refusal of models with activation checkpointing."""
    return UnsupportedModelError(
        "The model uses activation checkpointing, which runs parts of it again in the backward pass, where no rule "
        "sees them. Switch it off for explaining."
    )


def written_over(error: Exception) -> UnsupportedModelError:
    """The refusal of models through which autograd finds no gradient, though they run without one."""
    return UnsupportedModelError(
        "The model writes in place over activations that a gradient needs, so it runs without gradients only: torch's "
        f"autograd says {str(error).partition('. ')[0]!r}. Let it make a new tensor there (x = x + y for x += y, "
        "x.relu() for x.relu_()), or use a method without gradients (occlusion, rise, lime, kernel_shap)."
    )


def _batch_statistics(module: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The batch-norm in {module or 'the model'!r} takes its statistics from the batch, so each image's score "
        "depends on its batch mates, and no propagation rule is defined. Let it use running statistics "
        "(track_running_stats=True, training=False); saliency and other plain-gradient methods run on it as it is."
    )


def _drawn_windows(module: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The fractional max-pool in {module or 'the model'!r} draws its windows anew in each pass, so the score of an "
        "image is random, and no propagation rule is defined. Give it windows that stay (_random_samples=...); "
        "saliency and other plain-gradient methods run on it as it is."
    )


def _first(result: Any) -> Any:
    """What a function returned, or the first of several things."""
    return result[0] if isinstance(result, tuple | list) and result else result


def _custom_functions(outputs: Sequence[Tensor]) -> list[str]:
    """Autograd functions of the model's own (checkpoints too): their insides are out of a function mode's sight."""
    found: list[str] = []
    seen: set[Any] = set()
    todo: list[Any] = [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions)
        name = type(node).__name__
        if isinstance(node, torch.autograd.function.BackwardCFunction) and name not in _OWN_FUNCTIONS:
            found.append(name.removesuffix("Backward"))
    return found

"""The tape: record a forward pass once, replay it backward under any number of rules.

Recording runs the model under a `TorchFunctionMode`, which sees every torch function that the model calls, however
it is spelt. Each call that a rule may touch becomes a *site*: an `autograd.Function` that computes what the caller
asked for and whose backward asks the rule that is being replayed. Nothing is hooked onto or changed in the model,
and a module that runs five times is five sites. This is the only file with function modes and autograd functions.

In-place operations stay in place; where a rule reads the input, a copy of it is kept. If the model later writes over
an activation that a rule needs (which autograd's own formula would have allowed), the pass is recorded again with
that activation copied.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from attrbox.engine.operations import Operation, interpret, is_activation, is_decision, is_linear, name_of
from attrbox.engine.site import Rule, Site
from attrbox.errors import (
    ForwardError,
    ModelError,
    NoGradientError,
    OptionError,
    RuleError,
    UnsupportedModelError,
    near_miss,
)
from attrbox.memory import is_out_of_memory
from attrbox.shapes import Coverage, Operated

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


@dataclass(frozen=True)
class Reference:
    """What a reference forward pass left at each site, and the raw output of the model."""

    inputs: tuple[tuple[Tensor, ...] | None, ...]
    output: Any


class Tape:
    """One recorded forward pass. `replay` may be called any number of times.

    Attributes:
        images: the leaf that the gradients are taken with respect to, [n, ...].
        output: whatever the model returned.
        sites: the recorded sites in order of execution (without activations).
        passed: operations of the table that no rule of the recording covers: native, with their true derivative.
        unknown: non-linear operations that are not in the table, native too.
        feature_maps: layer name (or None: the last spatial feature map) -> its output, [n, C, ...].
    """

    def __init__(self, model: nn.Module, images: Tensor, output: Any, recorder: "_Recorder | None") -> None:
        self.model = model
        self.images = images
        self.output = output
        self.sites: tuple[Site, ...] = tuple(recorder.sites) if recorder else ()
        self.passed: tuple[Operated, ...] = tuple(recorder.passed) if recorder else ()
        self.unknown: tuple[Operated, ...] = tuple(recorder.unknown) if recorder else ()
        self.feature_maps: dict[str | None, Tensor] = recorder.feature_maps if recorder else {}
        self._needs = recorder.needs if recorder else {}
        self._replaying = recorder.replaying if recorder else _Replaying()

    def record_reference(self, reference: Tensor) -> Reference:
        """Forward a reference (batch of 1 for a shared one, or of n) and keep its activations at the sites.

        Raises:
            ModelError: the model takes another path on the reference than on the images.
        """
        copies: frozenset[int] = frozenset()
        while True:
            recorder = _Recorder(self.model, self._needs, (), copies, reference=True)
            with torch.enable_grad():  # as for the images: what requires a gradient is an activation
                output = forward(self.model, reference.detach().clone().requires_grad_(), recorder)
            if not (stale := recorder.stale()):
                break
            copies |= stale
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
        return Reference(tuple(recorder.kept), _detached(output))

    def replay(
        self,
        score: Tensor,
        inputs: Sequence[Tensor],
        rule: Rule | None = None,
        *,
        reference: Reference | None = None,
        create_graph: bool = False,
        keep: bool = True,
    ) -> tuple[Tensor, ...]:
        """Gradients of `score.sum()` with respect to `inputs` (the images, a feature map), under `rule`.

        Args:
            score: a tensor computed from `output`.
            rule: None for the true gradient.
            reference: for rules that compare with one.
            keep: False for the last replay: activations are freed while it runs.
            create_graph: the gradients can be differentiated once more, also with respect to the rule's parameters.

        Raises:
            NoGradientError: the score does not depend on the inputs.
            RuleError: the rule broke its contract, or needs what was not kept for the rules of the recording.
        """
        if rule is not None and rule.uses_reference and reference is None:
            raise RuleError(f"The rule {type(rule).__name__} compares with a reference; pass one to replay.")
        if not score.requires_grad:
            raise _no_gradient()
        self._replaying.rule, self._replaying.reference = rule, reference
        try:
            gradients = torch.autograd.grad(
                score.sum(), inputs, retain_graph=keep, create_graph=create_graph, allow_unused=True
            )
        except RuntimeError as error:
            if "use_reentrant" in str(error):  # its reentrant variant and autograd.grad
                raise _checkpointed() from error
            raise
        finally:
            self._replaying.rule = self._replaying.reference = None
        if any(gradient is None for gradient in gradients):
            raise _no_gradient()
        return gradients

    def coverage(self, rule: Rule | None) -> Coverage:
        """Which operations get the rule, which the true derivative."""
        treated = Operated.listed(self.sites)
        kinds = rule.kinds if rule else frozenset()
        return Coverage(
            tuple(operated for operated in treated if operated.operation in kinds),
            tuple(operated for operated in treated if operated.operation not in kinds) + self.passed,
            self.unknown,
        )


def record(
    model: nn.Module,
    images: Tensor,
    rules: Collection[Rule | None] = (),
    layers: Collection[str | None] = (),
) -> Tape:
    """Run `model` on `images` once, so that it can be replayed under each of `rules`.

    Without rules and layers nothing is intercepted and the forward pass is the native one. The model's parameters
    should not require gradients meanwhile (`attrbox.guard.untouched`): what requires one is taken for an activation.

    Args:
        model: the model, which gets a copy of the images, so that it may write into it.
        images: [n, ...], floating point.
        rules: the rules that will be replayed; they decide what is kept in memory. The true gradient (None) always can.
        layers: modules whose output is wanted in `feature_maps`; None means the last spatial feature map.

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
        recorder = _Recorder(model, needs, layers, copies)
        output = forward(model, leaf.clone(), recorder)
        if not (stale := recorder.stale()):
            break
        copies |= stale
    recorder.finish(output)
    return Tape(model, leaf, output, recorder)


def check_visible(model: nn.Module) -> None:
    """Raise if parts of the model run where a function mode cannot see them.

    Raises:
        UnsupportedModelError: the model, or a part of it, is scripted, traced, compiled or a DataParallel.
    """
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            state, remedy = "scripted or traced", "Explain the model as it was before torch.jit.script or trace"
        elif hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            state, remedy = "compiled", "Explain the original (compiled_model._orig_mod, or load it without compiling)"
        elif isinstance(module, nn.DataParallel):
            state, remedy = "replicated by DataParallel", "Explain its .module"
        else:
            continue
        raise UnsupportedModelError(
            f"{where.capitalize()} is {state}, so its single operations cannot be seen and no propagation rule "
            f"would reach them. {remedy}; saliency, integrated_gradients and the SmoothGrad family run on it as it is."
        )


def _needs(rules: Collection[Rule]) -> dict[str, frozenset[str]]:
    """What must be kept at each kind of site so that all of these, and the true gradient, can be replayed.

    The true gradient is what double backward comes through, whatever the rule.
    """
    needs: dict[str, frozenset[str]] = {}
    for kind in frozenset().union(*(rule.kinds for rule in rules)):
        needs[kind] = frozenset({"derivative"}).union(*(rule.needs_at(kind) for rule in rules if kind in rule.kinds))
    return needs


class _Replaying:
    """What the sites of one tape ask in a backward pass: the rule and the reference of the moment."""

    def __init__(self) -> None:
        self.rule: Rule | None = None
        self.reference: Reference | None = None

    def gradients(self, site: Site, inputs: Any, output: Tensor | None, shapes: list[Any], grad: Tensor) -> Any:
        """The gradients that a site passes on, one per input, of the inputs' shapes."""
        rule = self.rule if self.rule is not None and site.kind in self.rule.kinds else None
        reference = self.reference.inputs[site.index] if self.reference else None
        site = site.with_tensors(inputs, output, reference, type(rule).__name__ if rule else "")
        found = site.true_gradient(grad) if rule is None else rule.propagate(site, grad)
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
        # A product may have broadcast a factor: its gradient is summed over the copies.
        return tuple(gradient.sum_to_size(shape) for gradient, shape in zip(gradients, shapes, strict=True))


class _SiteFunction(torch.autograd.Function):
    """Computes an operation as the model asked for it; its backward asks the rule of the moment."""

    @staticmethod
    def forward(ctx: Any, replaying: _Replaying, site: Site, operation: Operation, needs: Any, *tensors: Tensor) -> Any:
        count = len(operation.inputs)
        inputs, copies = tensors[:count], tensors[count:]
        result = operation.run(*inputs)
        output = result[0] if isinstance(result, tuple) else result
        if operation.in_place:
            ctx.mark_dirty(inputs[0])
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


class _Recorder(TorchFunctionMode):
    """Watches one forward pass: makes sites, notes what is not understood, keeps wanted feature maps."""

    def __init__(
        self,
        model: nn.Module,
        needs: dict[str, frozenset[str]],
        layers: Collection[str | None],
        copies: frozenset[int],
        reference: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.sites: list[Site] = []
        self.passed: list[Operated] = []
        self.unknown: list[Operated] = []
        self.needs = needs
        self.feature_maps: dict[str | None, Tensor] = {}
        self.replaying = _Replaying()
        self.kept: list[tuple[Tensor, ...] | None] = []  # inputs at the sites, in a reference recording
        self._copies = copies
        self._reference = reference
        self._versions: list[tuple[int, Tensor, int]] = []  # what must not be written over: site, tensor, version
        self._modules: list[tuple[str, int]] = [("", 0)]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._calls: Counter[str] = Counter()
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
        operation = interpret(function, args, kwargs)
        if operation is not None and operation.kind in self.needs:
            result = self._keep(operation) if self._reference else self._make_site(operation)
        else:
            result = function(*args, **kwargs)
            if not self._reference:
                self._note(operation, function, args, kwargs, result)
        if None in self.layers:
            self._follow(function, result)
        return result

    def _site(self, operation: Operation) -> Site:
        module, call = self._modules[-1]
        site = Site(len(self.sites), operation.kind, module, call, operation.pure, operation.pull, operation.options)
        self.sites.append(site)
        return site

    def _make_site(self, operation: Operation) -> Any:
        if _is_checkpointing():
            raise _checkpointed()
        site = self._site(operation)
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
        if copying:
            output = operation.inputs[0].copy_(output) if operation.in_place else output.clone()
            return (output, *result[1:]) if isinstance(result, tuple) else output
        if "output" in needs:
            self._watch(site, output)
        if "input" in needs and not copies:
            self._watch(site, *inputs)
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

    def _note(self, operation: Operation | None, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Remember an operation that no rule touches, if it is not linear."""
        if operation is not None:
            self.passed.append(Operated(operation.kind, *self._modules[-1]))
            return
        first = result[0] if isinstance(result, tuple | list) and result else result
        if is_activation(first):
            if is_linear(function, args, kwargs):
                return
        elif not (isinstance(first, Tensor) and is_decision(function) and args and is_activation(args[0])):
            return
        self.unknown.append(Operated(name_of(function), *self._modules[-1]))

    def _follow(self, function: Any, result: Any) -> None:
        """Keep the last feature map: the last convolution's output, through all that leaves its grid as it is."""
        if not (is_activation(result) and result.dim() >= 3):
            return
        name, last = name_of(function), self.feature_maps.get(None)
        grid = result.shape[2:]
        if name in _CONVOLUTIONS:
            if max(grid) > 1:
                self.feature_maps[None] = result
        elif last is not None and "pool" not in name and grid == last.shape[2:]:
            self.feature_maps[None] = result

    def finish(self, output: Any) -> None:
        """After the forward pass: what went past the function mode, and layers that did not run.

        Raises:
            OptionError: a wanted layer does not exist, did not run, or has no feature map.
        """
        for layer in self.layers:
            if layer in self.feature_maps:
                continue
            if layer is None:
                raise OptionError(
                    "The model has no spatial feature map: no convolution with an output larger than one pixel ran. "
                    "Grad-CAM needs one; name it by layer=..., or use another method."
                )
            near = [name for name in self._names.values() if name]
            if layer not in near:
                raise OptionError(f"The model has no layer {layer!r}. {near_miss(layer, near)}")
            raise OptionError(f"The layer {layer!r} did not run, or its output depends not on the images.")
        for tensor in _tensors(output):
            self.unknown.extend(_custom_functions(tensor))

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
                self.feature_maps[name] = output
                # The model goes on with a copy: an in-place ReLU behind a convolution must not change the map.
                return output.clone()
        return None

    @property
    def running(self) -> str:
        """The module that is running, or that raised."""
        return self._modules[-1][0]


def forward(model: nn.Module, images: Tensor, recorder: _Recorder | None = None) -> Any:
    """Call the model; whatever it raises becomes a `ForwardError` (out of memory stays what it is)."""
    watching = recorder.watching() if recorder else contextlib.nullcontext()
    try:
        with watching:
            return model(images)
    except (ModelError, OptionError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ForwardError(
            f"The model raised {type(error).__name__} on images of shape {list(images.shape)}, {images.dtype}, on "
            f"{images.device}: {error}. Check that model(images) runs on its own (size, channels, dtype, device)."
        ) from error


def _is_checkpointing() -> bool:
    """Whether autograd forgets what is saved now, and will run the model's code again when it needs it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _checkpointed() -> UnsupportedModelError:
    return UnsupportedModelError(
        "The model uses activation checkpointing, which runs parts of it again in the backward pass, where no rule "
        "sees them. Switch it off for explaining."
    )


def _no_gradient() -> NoGradientError:
    return NoGradientError(
        "The explained score does not depend on the images: no gradient path leads back to them. Look for a detach(), "
        "a torch.no_grad() or a conversion to numpy in the model, or an argmax in the target function."
    )


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
    return [value for value in values if isinstance(value, Tensor)]


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, dict):
        return type(output)((key, _detached(value)) for key, value in output.items())
    return output


def _custom_functions(output: Tensor) -> list[Operated]:
    """Autograd functions of the model's own (checkpoints too): their insides are out of a function mode's sight."""
    found: list[Operated] = []
    seen: set[Any] = set()
    todo: list[Any] = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions)
        name = type(node).__name__
        if isinstance(node, torch.autograd.function.BackwardCFunction) and name != "_SiteFunctionBackward":
            found.append(Operated(name.removesuffix("Backward"), "", 0))
    return found

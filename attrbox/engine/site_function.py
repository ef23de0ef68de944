"""A site in the autograd graph: it computes what the model asked for, and its backward asks the rule of the moment."""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from attrbox.core.model_state import HALF, wide
from attrbox.engine.calling import plain
from attrbox.engine.operations.calls import Operation
from attrbox.engine.site import Gradients, Rule, Site, asked
from attrbox.errors import RuleError

aten: Any = torch.ops.aten


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
        self.records: list[Site] = []  # a layer that a batch-norm joins has two, of one index

    def gradients(self, record: int, inputs: Any, output: Tensor | None, shapes: list[Any], grad: Tensor) -> Any:
        """The gradients that a site passes on, one per input, of the inputs' shapes."""
        rule, site = self.rule, self.records[record]
        if rule is not None and not asked(rule, f"asked whether it treats {site.where}", partial(rule.treats, site)):
            rule = None
        reference = self.reference.inputs[site.index] if self.reference else None
        site = site.with_tensors(inputs, output, reference, type(rule).__name__ if rule else "")
        grad = plain(grad) if site.kind == "norm" else grad
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


def own(result: Tensor, *inputs: Tensor) -> Tensor:
    """A result that the model may write over, although autograd lets nobody write over a view that a function returned.

    Kernels return views of fresh memory, which are made plain tensors; a view of an input is copied.
    """
    if not result._is_view():
        return result
    memory = result.untyped_storage()._cdata
    if any(memory == tensor.untyped_storage()._cdata for tensor in inputs):
        return result.clone()
    return cast(Tensor, aten._unsafe_view(result, result.shape))


class SiteFunction(torch.autograd.Function):
    """Computes an operation as the model asked for it; its backward asks the rule of the moment."""

    @staticmethod
    def forward(ctx: Any, replaying: Replaying, record: int, operation: Operation, needs: Any, *tensors: Tensor) -> Any:
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
        ctx.replaying, ctx.record = replaying, record
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
        gradients = ctx.replaying.gradients(ctx.record, inputs, output, ctx.shapes, grad_output)
        return (None, None, None, None, *gradients, *(None,) * ctx.unused)

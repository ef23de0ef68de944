"""Attention rollout: how the attention of a transformer's layers adds up from the tokens to the class.

    Abar_l = row-normalised (A_l + 1),   A_l the mean over heads of layer l's attention
    map = row of the class token in Abar_L ... Abar_1, at the grid's tokens

Gradient-weighted, A_l is the mean over heads of relu(A_l * dS/dA_l), and its sum with 1 is not normalised (Chefer et
al., ICCV 2021, equations 5 and 6). Without a class token the mean over the grid's rows is taken.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrbox.engine.site import Gradients, Rule, Site
from attrbox.errors import OptionError
from attrbox.methods.base import register_method
from attrbox.methods.cam.grad_cam import Upsampled
from attrbox.methods.context.run import Run


class _Attention(Rule):
    """Notes each softmax's output and gradient, and passes the true gradient."""

    kinds = frozenset({"softmax"})
    needs = frozenset({"output", "derivative"})

    def __init__(self) -> None:
        self.found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def propagate(self, site: Site, grad_output: Tensor) -> Gradients:
        self.found.setdefault(site.index, []).append((site.output.detach(), grad_output.detach()))
        return site.true_gradient(grad_output)


@dataclass(frozen=True, kw_only=True)
class _Rollout(Upsampled):
    @property
    def rules(self) -> tuple[Rule | None, ...]:
        return (_Attention(),)

    @property
    def layers(self) -> tuple[str | None, ...]:
        return (None,)

    def step(self, attention: Tensor, gradient: Tensor) -> Tensor:
        """One layer's matrix, [n, T, T], of its attention and gradient [n, heads, T, T]."""
        raise NotImplementedError

    def attribute(self, run: Run) -> Tensor:
        rule = _Attention()
        run.gradient(rule)
        grid, count, targets = run.tape.grids[None], len(run.images), run.scores.shape[1]
        prefix, positions = grid.prefix or 0, torch.Size(grid.size).numel()
        tokens, end = grid.others + positions, prefix + positions
        layers = [rule.found[index] for index in sorted(rule.found)]
        if not layers or not all(_is_global(layer[0][0], count, tokens) for layer in layers):
            what = f"not all of its {len(layers)} softmaxes are that (windows, ...)" if layers else "it has no softmax"
            raise OptionError(
                f"Attention rollout needs a model with attention among all {tokens} tokens in every layer, but {what}. "
                "Use grad_cam, attn_lrp or deeplift."
            )
        maps = []
        for k in range(targets):
            flow: Any = torch.eye(tokens, dtype=run.images.dtype, device=run.images.device)
            for layer in layers:
                attention, gradient = (t.to(flow.dtype).reshape(count, -1, tokens, tokens) for t in layer[k])
                flow = self.step(attention, gradient) @ flow
            # The class token is the first of those that are no positions.
            maps.append(flow[:, 0 if prefix else end, prefix:end] if grid.others else flow.mean(1))
        return self.upsampled(run, torch.stack(maps, 1).reshape(count, targets, *grid.size))


def _is_global(attention: Tensor, count: int, tokens: int) -> bool:
    """Whether weights are [n, heads, T, T], or [n heads, T, T], of all T tokens."""
    whole = len(attention) == count if attention.dim() == 4 else attention.dim() == 3 and len(attention) % count == 0
    return whole and attention.shape[-2:] == (tokens, tokens)


@register_method(
    "attention_rollout",
    summary="Attention of all layers multiplied up, from the class token to the image; the same for every class",
    reference="Abnar & Zuidema, ACL 2020",
    only_for="transformers whose layers attend to all tokens",
)
@dataclass(frozen=True, kw_only=True)
class AttentionRollout(_Rollout):
    """Of transformers whose layers attend to all tokens, [N, 1, H, W]."""

    def step(self, attention: Tensor, gradient: Tensor) -> Tensor:
        del gradient
        both = attention.mean(1) + torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
        return both / both.sum(-1, keepdim=True)


@register_method(
    "gradient_rollout",
    summary="Attention of all layers, where it speaks for the class, multiplied up",
    reference="Chefer et al., ICCV 2021, equations 5 and 6",
    only_for="transformers whose layers attend to all tokens",
)
@dataclass(frozen=True, kw_only=True)
class GradientRollout(_Rollout):
    """Of transformers whose layers attend to all tokens, [N, 1, H, W]."""

    def step(self, attention: Tensor, gradient: Tensor) -> Tensor:
        positive = (attention * gradient).relu().mean(1)
        return positive + torch.eye(positive.shape[-1], dtype=positive.dtype, device=positive.device)

"""Scores and maps that are NaN or infinite: noticed, and traced to where they arose."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attrbox.engine.site import KINDS, Gradients, Rule, Site
from attrbox.engine.tape import record
from attrbox.errors import AttrboxError, NonFiniteError
from attrbox.methods.base import Method
from attrbox.methods.context.run import Run


def check_scores(model: nn.Module, scores: Tensor, start: int) -> None:
    """Refuse images whose explained score is NaN or infinite: nothing can be said about these.

    Args:
        model: what returned them.
        scores: [n, K].
        start: the number of the first image.

    Raises:
        NonFiniteError: there are some.
    """
    if bool(scores.isfinite().all()):
        return
    bad = (~scores.isfinite()).any(1).nonzero().flatten() + start
    weights = sum(not bool(p.isfinite().all()) for p in model.parameters() if p.is_floating_point())
    cause = (
        f"{weights} of its parameters have values that are not finite; load other weights."
        if weights
        else "Leave these images out, scale them as the model expects, or run it in a wider dtype."
    )
    raise NonFiniteError(
        f"Expected finite scores, but the model (or the target function) returned NaN or infinity for the images "
        f"{some(bad.tolist())}. {cause}"
    )


def told(label: str, rows: Sequence[int], where: str | None) -> str:
    """Say which maps of a method are not finite, and where that arose."""
    first = f"It arose first at {where}." if where else "No single site is to blame."
    return (
        f"The maps of {label!r} have NaN or infinite values for the images {some(rows)}. {first} Look for roots, "
        "logarithms and divisions at 0, for overflow in half precision, or choose another method."
    )


def some(rows: Sequence[int]) -> str:
    """Numbers of images, the first ten of them."""
    return f"{list(rows[:10])}{' ...' if len(rows) > 10 else ''}"


def first_site(run: Run, method: Method) -> str | None:
    """The first site, from the score down, at which the gradient of the run's images turned NaN or infinite, in words;
    None if there is no such site."""
    rules = [rule for rule in method.rules if rule is not None]
    finder = _Finder(rules[0] if rules else None)
    try:
        with run.passes.autocast_recorded():
            tape = record(run.model, run.images, [finder])
            baseline = run.samples.baseline(getattr(method, "baseline", 0.0)) if finder.uses_reference else None
            reference = None if baseline is None else tape.record_reference(baseline)
            scores = run.score(tape)
            for k in range(scores.shape[1]):
                tape.replay(scores[:, k], [tape.images], finder, reference=reference, keep=k + 1 < scores.shape[1])
    except AttrboxError:  # what cannot be recorded cannot be searched
        return None
    return finder.where


class _Finder(Rule):
    """Replays a rule, or the chain rule, and notes the first site that makes a finite gradient infinite."""

    def __init__(self, rule: Rule | None) -> None:
        self.rule = rule
        self.kinds = KINDS | (rule.kinds if rule is not None else frozenset())  # type: ignore[misc]
        self.where: str | None = None

    def needs_at(self, kind: str) -> frozenset[str]:
        own = self.rule.needs_at(kind) if self.rule is not None and kind in self.rule.kinds else frozenset()
        return own | {"derivative"}

    @property
    def uses_reference(self) -> bool:
        return self.rule is not None and self.rule.uses_reference

    def propagate(self, site: Site, grad_output: Tensor) -> Gradients:
        treats = self.rule is not None and self.rule.treats(site)
        found = self.rule.propagate(site, grad_output) if self.rule and treats else site.true_gradient(grad_output)
        parts = found if isinstance(found, tuple) else (found,)
        fine = all(bool(part.isfinite().all()) for part in parts if isinstance(part, Tensor))
        if self.where is None and not fine and bool(grad_output.isfinite().all()):
            self.where = site.where
        return found


def non_finite_rows(values: Tensor) -> Tensor:
    """Whether the maps of each image have a value that is not finite, [n]."""
    return ~torch.isfinite(values).flatten(1).all(1)

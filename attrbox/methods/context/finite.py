"""Scores and maps that are NaN or infinite: noticed, and traced to where they arose."""

from collections.abc import Sequence

from torch import Tensor

from attrbox.core.validation import some
from attrbox.engine.site import KINDS, Gradients, Rule, Site
from attrbox.engine.tape import record
from attrbox.errors import AttrboxError
from attrbox.methods.base import Method
from attrbox.methods.context.run import Run


def told(label: str, rows: Sequence[int], where: str | None) -> str:
    """Say which maps of a method are not finite, and where that arose."""
    first = f"It arose first at {where}." if where else "No single site is to blame."
    return (
        f"The maps of {label!r} have NaN or infinite values for the images {some(rows)}. {first} Look for roots, "
        "logarithms and divisions at 0, for overflow in half precision, or choose another method."
    )


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

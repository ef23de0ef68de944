"""Methods made of a propagation rule: replay the recorded pass under it, multiply by the input or not.

    values = (x - x0) * G,     G the gradient propagated by the rule, x0 the baseline (0 without a reference)

`register_rule` makes a method of every rule, also of those that users write.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from attrbox.core.options import OptionInfo, option_infos
from attrbox.core.registry import Registry, as_dataclass
from attrbox.core.results import ChannelReduction
from attrbox.core.validation import check_baseline, check_flag
from attrbox.engine.site import KINDS, LAYERS, Rule, asked
from attrbox.errors import OptionError
from attrbox.methods.base import Method, MethodSpec, method_registry
from attrbox.methods.context.run import Run
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.guided import Deconvnet, GuidedBackprop
from attrbox.rules.lrp.activations import LRPEpsilon

_NEEDS = frozenset({"input", "output", "derivative", "reference"})


@dataclass(frozen=True, kw_only=True)
class RuleMethod(Method):
    """Input times propagated gradient, or the propagated gradient alone."""

    rule: Rule
    times_input: bool
    absolute: bool
    baseline: float | Tensor = 0.0
    sums_to: str = ""

    def __post_init__(self) -> None:
        check_flag("times_input", self.times_input)
        check_flag("absolute", self.absolute)
        check_baseline(self.baseline)

    @property
    def rules(self) -> tuple[Rule | None, ...]:
        return (self.rule,)

    def attribute(self, run: Run) -> Tensor:
        values = run.gradient(self.rule, self.baseline)
        if self.times_input:
            start = run.samples.baseline(self.baseline) if self.rule.uses_reference else 0
            images = (run.images - start).unsqueeze(1)
            making = partial(self.rule.relevance, values, images)
            values = asked(self.rule, "making a map of the gradient at the images", making)
        return values.abs() if self.absolute else values

    def expected(self, run: Run) -> Tensor | None:
        if not self.times_input or self.absolute or not self.sums_to:
            return None
        return run.scores - run.baseline_scores(self.baseline) if self.sums_to == "difference" else run.scores


@dataclass(frozen=True)
class RuleSpec:
    """A registry record of a rule; the method of the same name replays it."""

    name: str
    rule: type[Rule]
    summary: str
    reference: str
    aliases: tuple[str, ...] = ()


rule_registry: Registry[RuleSpec] = Registry("rule", "attrbox.rules")

R = TypeVar("R", bound=type[Rule])


def register_rule(
    name: str,
    *,
    summary: str,
    reference: str,
    aliases: tuple[str, ...] = (),
    times_input: bool = True,
    sums_to: str = "",
    reduction: ChannelReduction = "sum",
    help: dict[str, str] | None = None,
) -> Callable[[R], R]:
    """Class decorator: enter a `Rule` into the registry; at once it is a method of the same name.

    Args:
        name: what users type.
        summary: one line for tables.
        reference: where the rule was published.
        aliases: other names.
        times_input: default of the method's option of that name: values are input x propagated gradient.
        sums_to: "difference" if the values then sum to score(image) - score(baseline), "score" if to the score.
        reduction: how the channels become one map for the eye.
        help: a line for each of the rule's own options (the fields of its dataclass).

    Raises:
        DuplicateNameError: the name is taken by another rule or method.
        OptionError: a name is blank; the class is none that can be registered (`attrbox.core.registry.as_dataclass`),
            or declares kinds or needs that do not exist.
    """

    def enter(cls: R) -> R:
        rule_registry.check_names(name, aliases)
        method_registry.check_names(name, aliases)
        as_dataclass(cls, Rule)
        for what, declared, known in (("kinds", cls.kinds, KINDS | LAYERS), ("needs", cls.needs, _NEEDS)):
            if not set(declared) <= known:
                raise OptionError(
                    f"The rule {cls.__name__} declares {what} {sorted(set(declared) - known)}, but there are only "
                    f"{sorted(known)}."
                )
        compares = "reference" in cls.needs
        own = {info.name for info in option_infos(cls)}
        if taken := sorted(own & {"times_input", "absolute", "baseline"}):
            raise OptionError(
                f"The rule {cls.__name__} has {', '.join(taken)}, an option that its method has. Rename it."
            )

        def build(
            times_input: bool = times_input, absolute: bool = False, baseline: Any = 0.0, **options: Any
        ) -> Method:
            return RuleMethod(
                rule=cls(**options), times_input=times_input, absolute=absolute, baseline=baseline, sums_to=sums_to
            )

        options = [dataclasses.replace(info, help=(help or {}).get(info.name, info.help)) for info in option_infos(cls)]
        options.append(OptionInfo("times_input", times_input, "multiply the propagated gradient by the input"))
        options.append(OptionInfo("absolute", False, "absolute values instead of signed ones"))
        if compares:
            options.append(OptionInfo("baseline", 0.0, "a number, or a tensor [C, H, W] or [N, C, H, W]"))
        units = "score" if times_input else "score per unit of input"
        rule_registry.add(RuleSpec(name, cls, summary, reference, aliases))
        try:
            method_registry.add(MethodSpec(name, build, summary, reference, tuple(options), aliases, reduction, units))
        except Exception:
            rule_registry.remove(name)
            raise
        return cls

    return enter


def _adopt(name: str, loaded: Any) -> None:
    """Enter what an entry point of `attrbox.rules` names, if importing it did not do so."""
    summary = (loaded.__doc__ or name).strip().splitlines()[0]
    register_rule(name, summary=summary, reference=f"plug-in {loaded.__module__}")(loaded)


rule_registry.adopt = _adopt
method_registry.also_load.append(rule_registry)

register_rule(
    "guided_backprop",
    summary="Gradient that lets only positive signals back through active rectifiers",
    reference="Springenberg et al., ICLR 2015 workshop",
    aliases=("guided_bp", "GBP"),
    times_input=False,
    reduction="max",
)(GuidedBackprop)

register_rule(
    "deconvnet",
    summary="Gradient that lets only positive signals back through every rectifier",
    reference="Zeiler & Fergus, ECCV 2014",
    times_input=False,
    reduction="max",
)(Deconvnet)

register_rule(
    "lrp_epsilon",
    summary="Layer-wise relevance propagation, epsilon rule",
    reference="Bach et al., PLoS ONE 2015, equation 58; Ancona et al., ICLR 2018, proposition 1",
    aliases=("e-LRP", "epsilon_lrp"),
    sums_to="score",
    help={"epsilon": "stabiliser, in units of the activation"},
)(LRPEpsilon)

register_rule(
    "deeplift",
    summary="Slopes between a baseline and the input (Rescale), complete on max-pools, softmax and products",
    reference="Shrikumar et al., ICML 2017, equation 11; RevealCancel: section 3.5.3",
    sums_to="difference",
    help={"reveal_cancel": "RevealCancel behind these layers: none, linear (the original's presets) or all"},
)(DeepLift)

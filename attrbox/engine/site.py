"""Sites and rules: the two things that an author of propagation rules meets.

A *site* is one call of a non-linear operation in a recorded forward pass. A *rule* says how the gradient with
respect to the site's output becomes the one with respect to its input, in place of the chain rule's

    grad_input = f'(input) * grad_output
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from attrbox.core.memory import is_out_of_memory
from attrbox.errors import AttrboxError, RuleError

Gradients: TypeAlias = "Tensor | tuple[Tensor, ...]"
T = TypeVar("T")
Info = TypeVar("Info", bound="SiteInfo")

# Kinds of sites. Rectifiers let one half of the axis pass, squashers bound their input; both act element by element.
RECTIFIERS = frozenset("relu relu6 leaky_relu prelu elu selu celu softplus gelu silu hardswish mish".split())
SQUASHERS = frozenset("sigmoid tanh hardsigmoid hardtanh".split())
ACTIVATIONS = RECTIFIERS | SQUASHERS
# Other functions of one number: sqrt, rsqrt and reciprocal are powers, exp2 an exp, log1p a log.
FUNCTIONS = frozenset("abs exp log power erf sin cos logsigmoid softshrink hardshrink threshold".split())
ELEMENTWISE = ACTIVATIONS | FUNCTIONS
GATES = frozenset({"sigmoid", "hardsigmoid"})  # between 0 and 1: a factor made by one scales the other factor
# Along axes, and of two activations. "matmul" is whatever is linear in each of two activations: einsum, bmm, ...;
# "norm" are layer, group, instance and RMS norms with the statistics of the moment.
REDUCTIONS = frozenset("softmax log_softmax logsumexp max_pool norm vector_norm".split())
PAIRS = frozenset("product quotient matmul maximum".split())
KINDS = ELEMENTWISE | REDUCTIONS | PAIRS
# Linear: the true gradient is what most rules mean there. A rule that names these kinds treats their weights.
LAYERS = frozenset({"convolution", "linear", "batch_norm"})


@dataclass(frozen=True, eq=False)
class SiteInfo:
    """What a rule may know of a site besides its tensors: one of the classes below, by its kind."""


@dataclass(frozen=True, eq=False)
class FunctionInfo(SiteInfo):
    """Of elementwise functions.

    Attributes:
        bounds: between which the output is the input, of functions that cut it off: (0, inf) for ReLU, (0, 6) for
            ReLU6.
        layer: the kind of the layer whose output goes into this activation alone, if a rule treats such layers.
    """

    bounds: tuple[float, float] | None = None
    layer: str | None = None


@dataclass(frozen=True, eq=False)
class AxesInfo(SiteInfo):
    """Of softmaxes, log-sum-exps and lengths: along which axes, and whether these stay in the output as 1."""

    dim: Any
    keepdim: bool = True


@dataclass(frozen=True, eq=False)
class PoolInfo(SiteInfo):
    """Of max-pools: `pool` maps inputs to outputs and the winners' positions, counted along the last `dims` axes;
    `by_row` tells that each image of the batch has windows of its own."""

    pool: Callable[[Tensor], tuple[Tensor, Tensor]]
    dims: int
    by_row: bool = False


@dataclass(frozen=True, eq=False)
class NormInfo(SiteInfo):
    """Of norms of `size` neighboring elements; `centered` ones subtract the mean."""

    size: int
    weight: Tensor | None
    centered: bool
    eps: float


@dataclass(frozen=True, eq=False)
class PairInfo(SiteInfo):
    """Of operations on two activations.

    Attributes:
        gates: for each factor of a product, whether a sigmoid made it.
        constant: whether the numerator of a quotient does not depend on the images.
        sign: 1 for a maximum, -1 for a minimum.
    """

    gates: tuple[bool, bool] = (False, False)
    constant: bool = False
    sign: int = 1


@dataclass(frozen=True, eq=False)
class LayerInfo(SiteInfo):
    """Of convolutions, linear layers and batch-norms.

    Attributes:
        apply: (input, weight, bias) -> output.
        weight, bias: of the layer, and of the batch-norm that is joined to it.
        axis: of the outputs, counted from the end.
        turned: the groups of a transposed convolution; 0 for all others.
        nonnegative: whether the input is known to be.
        joined: whether a batch-norm is.
        first, last: of the layers that ran in the model.
        activation: the site that alone takes the output.
    """

    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    weight: Tensor
    bias: Tensor | None
    axis: int
    turned: int = 0
    nonnegative: bool = False
    joined: bool = False
    first: bool = False
    last: bool = False
    activation: "Site | None" = None


@dataclass(frozen=True, eq=False)
class Site:
    """One call of a non-linear operation, as a rule sees it during a replay.

    Attributes:
        index: position in the order of execution.
        kind: "relu", "gelu", "max_pool", "softmax", "product", ... (`attrbox.engine.site.KINDS`).
        module: qualified name of the innermost module that ran it; "" for the model itself.
        call: zero-based index of this call among the module's calls in the forward pass.
        repeat: zero-based index of this operation among those of its kind in that call.
        function: the operation without side effects, inputs -> output, other arguments bound.
        info: what else a rule may need; `about` returns it as one of the classes above.
        floor: a number that no output is below; -inf if none is known.
        shapes: of the inputs.

    The tensors below have the batch first. They are kept only if some rule of the recording `needs` them; reading
    another raises `RuleError`.
    """

    index: int
    kind: str
    module: str
    call: int
    function: Callable[..., Tensor]
    pull: "Callable[[Site, Tensor], Gradients] | None" = None  # a faster true gradient than the general one
    info: SiteInfo = SiteInfo()
    floor: float = -torch.inf
    shapes: tuple[torch.Size, ...] = ()
    repeat: int = 0
    rule: str = ""  # name of the rule that is being replayed, for messages; none for the true gradient
    saved_inputs: tuple[Tensor, ...] | None = None
    saved_output: Tensor | None = None
    saved_reference: tuple[Tensor, ...] | None = None

    def about(self, kind: type[Info]) -> Info:
        """The site's `info`, of one class: `site.about(LayerInfo).weight`.

        Raises:
            RuleError: sites of this kind have another.
        """
        if not isinstance(self.info, kind):
            raise RuleError(
                f"A {self.kind} has no {kind.__name__} but a {type(self.info).__name__} ({self.where}). Look at "
                "site.kind before, or leave this kind out of the rule's kinds."
            )
        return self.info

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All activations that went in: one, or the two factors of a product."""
        if self.saved_inputs is None:
            raise self._missing("input")
        return self.saved_inputs

    @property
    def input(self) -> Tensor:
        """The activation that went in (the first factor of a product)."""
        return self.inputs[0]

    @property
    def output(self) -> Tensor:
        """The activation that came out; computed again from the input where only that was kept."""
        if self.saved_output is not None:
            return self.saved_output
        if self.saved_inputs is None:
            raise self._missing("output")
        return self.function(*self.saved_inputs)

    @property
    def reference_inputs(self) -> tuple[Tensor, ...]:
        """The inputs at this site when the reference is forwarded; batch of one for a shared reference."""
        if self.saved_reference is None:
            raise self._missing("reference")
        return self.saved_reference

    @property
    def reference_input(self) -> Tensor:
        """The first of `reference_inputs`."""
        return self.reference_inputs[0]

    @property
    def reference_output(self) -> Tensor:
        """The output at this site when the reference is forwarded."""
        return self.function(*self.reference_inputs)

    def derivative(self) -> Tensor:
        """f'(input), element by element.

        Raises:
            RuleError: the operation does not act element by element; use `true_gradient`.
        """
        if self.kind not in ELEMENTWISE:
            raise RuleError(
                f"A {self.kind} does not act element by element, so it has no derivative of its input's shape "
                f"({self.where}). Use site.true_gradient(grad_output), or leave {self.kind!r} out of the rule's kinds."
            )
        like = self.saved_output if self.saved_output is not None else self.input
        gradient = self.true_gradient(torch.ones_like(like))
        assert isinstance(gradient, Tensor)
        return gradient

    def true_gradient(self, grad_output: Tensor) -> Gradients:
        """The chain rule: the vector-Jacobian product of the operation; a pair for a product."""
        if self.pull is not None:
            return self.pull(self, grad_output)
        # The general case: run the operation again on its own, and let autograd differentiate it. With
        # create_graph, the copy stays tied to the recorded input, so that double backward sees f''.
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = tuple(
                i if differentiable and i.requires_grad else i.detach().requires_grad_() for i in self.inputs
            )
            aliases = tuple(i.view_as(i) for i in inputs)  # x * x: each factor gets its own gradient
            gradients = torch.autograd.grad(self.function(*aliases), aliases, grad_output, create_graph=differentiable)
        return gradients if len(gradients) > 1 else gradients[0]

    def at(self, *inputs: Tensor) -> "Site":
        """The same operation on other inputs."""
        return replace(self, saved_inputs=inputs, saved_output=None)

    @property
    def where(self) -> str:
        """The site in words, for messages."""
        number = f" {self.repeat + 1}" if self.repeat else ""
        return (
            f"site {self.index}, {self.kind}{number} in module {self.module or 'the model itself'!r}, call {self.call}"
        )

    @property
    def name(self) -> str:
        """The site's name in files, unique in a forward pass: "layer1.0:1:relu#2" is the second ReLU in the second
        call of that module."""
        return f"{self.module}:{self.call}:{self.kind}" + (f"#{self.repeat + 1}" if self.repeat else "")

    def with_tensors(
        self,
        inputs: tuple[Tensor, ...] | None,
        output: Tensor | None,
        reference: tuple[Tensor, ...] | None,
        rule: str,
    ) -> "Site":
        """This site with what was kept of it; records stay immutable and hold no activations themselves."""
        return replace(self, saved_inputs=inputs, saved_output=output, saved_reference=reference, rule=rule)

    @property
    def splits_into_rows(self) -> bool:
        """Whether the operation treats each row (index of the first axis) on its own, as all activations do."""
        tensors = (*(self.saved_inputs or ()), *((self.saved_output,) if self.saved_output is not None else ()))
        kept = {len(tensor) for tensor in tensors if tensor.dim() > 1}
        against = {len(tensor) for tensor in self.saved_reference or ()}
        return (
            self.kind in ACTIVATIONS
            and len(kept) <= 1
            and all(tensor.dim() > 1 for tensor in tensors)
            and (against <= kept | {1})
        )

    def rows(self, some: slice) -> "Site":
        """The site with some rows of its tensors; a shared reference stays whole."""

        def cut(tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            return None if tensors is None else tuple(t if len(t) == 1 else t[some] for t in tensors)

        output = None if self.saved_output is None else self.saved_output[some]
        return replace(
            self, saved_inputs=cut(self.saved_inputs), saved_output=output, saved_reference=cut(self.saved_reference)
        )

    def _missing(self, need: str) -> RuleError:
        return RuleError(
            f"The rule {self.rule!r} reads the {need} of {self.where}, which was not kept. "
            f"Declare it: needs = frozenset({{{need!r}, ...}}) in the rule's class, and record with this rule."
        )


class Rule(ABC):
    """How a gradient passes a non-linearity. Subclass it, implement `propagate`, and register it.

    `kinds`: the kinds of sites that the rule is asked about; the true derivative holds at all others.
    `by_rows`: whether it may be asked for some samples at a time, which is faster on CPUs where it computes much.
    `needs`: which tensors `propagate` reads, of "input", "output", "derivative" (for `site.derivative()` and
    `site.true_gradient()`) and "reference"; nothing else is kept in memory.

    A rule is pure: no state, no dependence between samples, only differentiable torch operations. Rules with
    options are frozen dataclasses.
    """

    kinds: ClassVar[frozenset[str]] = ACTIVATIONS
    needs: ClassVar[frozenset[str]] = frozenset({"derivative"})
    by_rows: ClassVar[bool] = False

    def needs_at(self, kind: str) -> frozenset[str]:
        """What `propagate` reads at sites of this kind; override it where it is less than `needs`."""
        del kind
        return self.needs

    def treats(self, site: Site) -> bool:
        """Whether it is asked about a site; override it where that is not every site of its kinds."""
        return site.kind in self.kinds

    def check(self, sites: Sequence[Site]) -> None:  # noqa: B027 - most are defined on all models
        """Raise `OptionError` if the rule is not defined on a model with these sites."""

    @abstractmethod
    def propagate(self, site: Site, grad_output: Tensor) -> Gradients:
        """Gradient with respect to the site's input, of its shape; a pair for a product (any broadcast shape)."""

    def relevance(self, gradient: Tensor, images: Tensor) -> Tensor:
        """What a method that multiplies by the input makes of the propagated gradient."""
        return gradient * images

    @property
    def uses_reference(self) -> bool:
        """Whether the rule compares with a reference recording."""
        return "reference" in self.needs


def asked(rule: Rule, what: str, question: Callable[[], T]) -> T:
    """The answer of a rule; whatever the rule itself raises is told as its mistake.

    Args:
        rule: of a user, perhaps.
        what: it is asked, for the message.
        question: to the rule.

    Raises:
        RuleError: the original exception is its cause. Errors of attrbox and of memory stay as they are.
    """
    try:
        return question()
    except Exception as error:
        if isinstance(error, AttrboxError) or is_out_of_memory(error):
            raise
        raise RuleError(
            f"The rule {type(rule).__name__!r} raised {type(error).__name__} {what}: {error}. Look at its code."
        ) from error

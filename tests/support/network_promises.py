"""What must hold of any network of known operations, in float64."""

import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import hypothesis.strategies as st
import torch
from hypothesis import reject
from hypothesis.errors import UnsatisfiedAssumption
from network_blocks import BLOCKS, CONSTANTS, ONE_BRANCH, STEPS
from random_networks import SPELLINGS, Network, Step, weighted
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import attrbox
from attrbox.errors import AttrboxError, OptionError

PROPAGATION: list[tuple[str, dict[str, object]]] = [
    ("saliency", {"absolute": False}),
    ("gradient_x_input", {}),
    ("guided_backprop", {}),
    ("deconvnet", {}),
    ("deeplift", {}),
    ("lrp_epsilon", {}),
    ("lrp", {}),
    ("epsilon_plus", {}),
    ("epsilon_alpha2_beta1", {}),
    ("epsilon_gamma_box", {}),
    ("deep_taylor", {"first": "w_square"}),
    ("excitation_backprop", {}),
    ("attn_lrp", {"gamma_convolution": 0.25}),
]
_OPTIONS = {name: {option.name for option in attrbox.method_registry[name].options} for name, _ in PROPAGATION}
AUDITED = [name for name, options in _OPTIONS.items() if "audit" in options]
ROUNDING = 1e-8
FREQUENT = set("conv linear batch_norm max_pool avg_pool tokens attention multihead transformer gru lstm again".split())


class BrokenError(AssertionError):
    """A promise that a network shows not to hold, with code that shows it."""


@dataclass
class Case:
    """A network, and which of its spellings and of the methods' options are tried."""

    network: Network
    spelling: str = "functional"
    baseline: str = "one number"
    audited: str = "epsilon_plus"

    @cached_property
    def model(self) -> nn.Module:
        return self.network.model()

    @cached_property
    def other(self) -> nn.Module:
        """The model in the other spelling."""
        return self.network.model(self.spelling)

    @property
    def start(self) -> "float | Tensor":
        start: float | Tensor = eval(BASELINES[self.baseline], {"torch": torch, "images": self.network.images})
        return start

    def broken(self, claim: str, call: str, spelling: str = "modules") -> BrokenError:
        """The failure as a program of its own.

        `call` may speak of `model` and `images`, and of `plain`, the model in modules, if `spelling` is another one.
        """
        network, other = self.network, spelling != "modules"
        lines = [f"# {line}" for line in (*claim.splitlines(), repr(network))]
        lines += ["import torch", "import torch.nn.functional as F", "from torch import nn", "", "import attrbox"]
        lines += ["", "", network.code(spelling), "", "", inspect.getsource(weighted), ""]
        lines += [network.code(name="Plain"), "", ""] if other else []
        lines += [f"model = weighted(Net(), {network.seed})"]
        lines += [f"plain = weighted(Plain(), {network.seed})"] if other else []
        shape = ", ".join(map(str, network.shape))
        lines += [f"generator = torch.Generator().manual_seed({network.seed})"]
        lines += [f"images = torch.randn(2, {shape}, dtype=torch.float64, generator=generator)", call]
        return BrokenError("\n".join(lines))


BASELINES = {
    "one number": "0.0",
    "another number": "0.5",
    "for all": "images[0].flip(-1)",
    "for each": "images.flip(0)",
    "half of the image": "torch.where(torch.arange(images.shape[-1]) % 2 > 0, images, 0.0)",
}


# What networks are mostly made of comes more often than the rest.
PLAIN = [*STEPS, *[name for name in STEPS if name.split()[0].strip(",") in FREQUENT] * 2]
SHAPES = ((3, 6, 5), (2, 8, 8), (4, 7), (3, 5, 6), (2, 4, 3, 4), (6,))


def _steps(draw: random.Random, least: int, most: int, depth: int) -> tuple[Step, ...]:
    return tuple(_step(draw, depth) for _ in range(draw.randint(least, most)))


def _step(draw: random.Random, depth: int) -> Step:
    if depth == 0 or draw.randrange(4) < 3:
        return PLAIN[draw.randrange(len(PLAIN))]
    name = list(BLOCKS)[draw.randrange(len(BLOCKS))]
    return (name, *(_steps(draw, 1, 3, depth - 1) for _ in range(1 if name in ONE_BRANCH else 2)))


def cases(most: int = 9) -> st.SearchStrategy[Case]:
    # Steps by hypothesis' own random numbers, which spread more evenly than its lists.
    steps = st.randoms(use_true_random=False).map(lambda draw: _steps(draw, 2, most, 2))
    networks = st.builds(Network, st.sampled_from(SHAPES), steps, st.integers(0, 999))
    return st.builds(
        Case, networks, st.sampled_from(SPELLINGS[1:]), st.sampled_from(list(BASELINES)), st.sampled_from(AUDITED)
    )


class _Largest(TorchFunctionMode):
    """Notes the largest number that a model computes."""

    value = 0.0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.numel():
            self.value = max(self.value, float(result.detach().abs().nan_to_num(torch.inf).max()))
        return result


def check(case: Case) -> None:
    """Raise `BrokenError` where a promise does not hold."""
    network, x = case.network, case.network.images
    model, other = case.model, case.other
    leaf = x.clone().requires_grad_()
    with _Largest() as largest:
        scores = model(leaf)
    (gradient,) = torch.autograd.grad(scores[:, 1].sum(), leaf)
    if not bool(gradient.isfinite().all()) or not largest.value < 1e6:
        reject()  # roots of 0; signals that explode, on the way too, which leave no digits to compare
    same = torch.allclose(other(x.clone()), scores, rtol=1e-10, atol=1e-10)
    assert same, f"the spelling {case.spelling!r} of {network} is another function"
    try:
        found = attrbox.compare(model, x, PROPAGATION, target=1, progress=False, strict=True)
    except AttrboxError as error:
        raise case.broken(f"refused: {error}", _COMPARE) from error
    show = "leaf = images.clone().requires_grad_()\nprint({} - torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0])"
    _equal(case, found["saliency"], gradient, "saliency is not autograd's gradient", show)
    alone = attrbox.compare(model, x, PROPAGATION, target=1, progress=False, batch_size=1)
    for method, _ in PROPAGATION:
        call = "alone = " + _map(method, "model", "images[:1]") + "\nprint({}[:1] - alone)"
        _equal(case, alone[method], found[method].values, f"{method} is another map alone", call)
    _same_in_another_spelling(case, found)
    _complete(case)
    if network.used:
        _conserved(case)


def check_and_shrink(case: Case) -> None:
    """The same; a failure is told of the smallest network that shows one of its kind."""
    try:
        check(case)
    except UnsatisfiedAssumption:
        raise
    except Exception as error:
        check(shrunk(case, partial(_breaks, type(error))))
        raise


def _breaks(kind: type[Exception], case: Case) -> bool:
    try:
        check(case)
    except UnsatisfiedAssumption:
        return False
    except Exception as error:
        return type(error) is kind
    return False


def shrunk(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The case without the steps that `fails` does not need."""
    for steps in _smaller(case.network.steps):
        smaller = replace(case, network=replace(case.network, steps=steps))
        if fails(smaller):
            return shrunk(smaller, fails)
    return case


def _smaller(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """A half; one step fewer; a block's branch in its place; one of its branches smaller."""
    if len(steps) > 3:
        yield from (steps[: len(steps) // 2], steps[len(steps) // 2 :])
    for place, step in enumerate(steps):
        before, behind = steps[:place], steps[place + 1 :]
        yield before + behind
        if not isinstance(step, str):
            for number, branch in enumerate(step[1:], 1):
                yield before + branch + behind
                for smaller in _smaller(branch):
                    yield (*before, (*step[:number], smaller, *step[number + 1 :]), *behind)


def _equal(
    case: Case, found: attrbox.Attribution, wanted: Tensor, claim: str, show: str, spelling: str = "modules"
) -> None:
    """`show` prints the difference, with {} for the map."""
    method, values, score = found.method, found.values, float(found.score.abs().max())
    error, size = _apart(values, wanted), float(torch.maximum(wanted.abs(), values.abs()).max())
    if error <= ROUNDING or size <= ROUNDING * score or error <= 100 * _apart(_rounded(case, method), wanted):
        # Equal; or empty but for rounding; or near a kink or a root of 0, where rounding alone moves the map as much.
        return
    call = show.replace("{}", _map(method, "model", "images"))
    raise case.broken(f"{claim}: {error:.1e} of the largest value", call, spelling)


def _apart(values: Tensor, wanted: Tensor) -> float:
    scale = torch.maximum(wanted.abs(), values.abs()).amax().clamp(min=1e-9)
    return float((values - wanted).abs().max() / scale)


def _rounded(case: Case, method: str) -> Tensor:
    """The map of the images with other last digits."""
    x, options = case.network.images, dict(PROPAGATION)[method]
    x = x * (1 + 1e-15 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0)).sign())
    return attrbox.explain(case.model, x, method, target=1, progress=False, **options).values


_COMPARE = f"entries = {PROPAGATION}\nattrbox.compare(model, images, entries, target=1, strict=True)"


def _map(method: str, model: str, images: str) -> str:
    return f"attrbox.explain({model}, {images}, {method!r}, target=1{_written(dict(PROPAGATION)[method])}).values"


def _written(options: dict[str, object]) -> str:
    return "".join(f", {name}={value!r}" for name, value in options.items())


def _same_in_another_spelling(case: Case, found: attrbox.Comparison) -> None:
    try:
        others = attrbox.compare(case.other, case.network.images, PROPAGATION, target=1, progress=False, strict=True)
    except AttrboxError as error:
        raise case.broken(f"refused {case.spelling}: {error}", _COMPARE, case.spelling) from error
    for method, _ in PROPAGATION:
        claim = f"{method} is another map written {case.spelling}"
        show = f"print({{}} - {_map(method, 'plain', 'images')})"
        _equal(case, others[method], found[method].values, claim, show, case.spelling)


def _complete(case: Case) -> None:
    """The maps of DeepLIFT sum to the difference of the scores."""
    x, start = case.network.images, case.start
    model = case.model
    with torch.no_grad():
        there = model(start.expand_as(x).clone() if isinstance(start, Tensor) else torch.full_like(x, start))
        wanted = model(x)[:, 1] - there[:, 1]
    for reveal_cancel in ("none", "all"):
        try:
            maps = attrbox.explain(
                model, x, "deeplift", target=1, baseline=start, reveal_cancel=reveal_cancel, progress=False
            )
        except OptionError:
            continue  # no place for RevealCancel
        values = maps.values.flatten(1)
        rounding = 1e-12 * there.abs().amax(1)  # of the scores themselves
        scale = values.abs().sum(1) + wanted.abs() + rounding / ROUNDING
        gap = float(((values.sum(1) - wanted).abs() / scale.clamp(min=1e-300)).max())
        if not gap <= ROUNDING:
            options = f"baseline={BASELINES[case.baseline]}, reveal_cancel={reveal_cancel!r}"
            call = f"print(attrbox.explain(model, images, 'deeplift', target=1, {options}).gap)"
            raise case.broken(f"deeplift misses {gap:.1e} of its map", call)


def _conserved(case: Case) -> None:
    """Layers account for all relevance that they keep; between sites it is only added constants that keep any."""
    method = case.audited
    options = {**dict(PROPAGATION)[method], "audit": True}
    maps = attrbox.explain(case.model, case.network.images, method, target=1, progress=False, **options)
    audit = maps.coverage.conservation
    layers = [
        place for place, site in enumerate(audit.sites) if site.operation in ("convolution", "linear", "batch_norm")
    ]
    scale = torch.maximum(audit.arriving.abs().amax(2), audit.leaving.abs().amax(2)) + maps.score[:, None].abs()
    kept = audit.bias + audit.stabiliser + audit.clamp
    off = ((kept - audit.absorbed)[..., layers].abs().sum(2) / scale).max()
    call = f"maps = attrbox.explain(model, images, {method!r}, target=1{_written(options)})\n"
    call += "print(maps.coverage.conservation.table())"
    if not off <= ROUNDING:
        raise case.broken(f"layers under {method} do not account for {off:.1e} of the relevance", call)
    used = case.network.used
    # A first layer that divides by its inputs loses what it gives to those that the steps before it set to 0.
    divides = method in ("epsilon_gamma_box", "deep_taylor") and not used[0].startswith(("conv", "linear"))
    lost = (audit.constants.abs() / scale).max()
    if not lost <= ROUNDING and not divides and not CONSTANTS & set(used):
        raise case.broken(f"{lost:.1e} of the relevance is lost between the sites under {method}", call)

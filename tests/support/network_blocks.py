"""The steps of random networks that mix: weights, tokens, attention, recurrent cells, modules used again; and blocks of
steps, which join branches."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from network_steps import STEPS, step
from random_networks import Step, Writer

BLOCKS: dict[str, Callable[..., None]] = {}


def block(name: str) -> Callable[[Any], Any]:
    def enter(write: Callable[..., None]) -> Callable[..., None]:
        BLOCKS[name] = write
        return write

    return enter


# ------------------------------------------------------------------------------------------------ weights and mixing


@step("position")
def position(w: Writer) -> None:
    name = w.parameter(1, *w.shape)
    w.run(f"{{x}} + {name}", f"torch.add({{x}}, {name})", in_place=[f"{{x}} += {name}"], saved=False)


@step("layer scale")
def layer_scale(w: Writer) -> None:
    shape = [1] * len(w.shape)
    shape[-1 if w.state.channels_last else 0] = w.channels
    name = w.parameter(*shape)
    w.run(f"{{x}} * {name}", f"{name} * {{x}}", in_place=[f"{{x}} *= {name}"], saved=False)


@step("einsum")
def einsum(w: Writer) -> None:
    name = w.parameter(4, w.shape[0])
    w.run(f"torch.einsum('oc,nc...->no...', {name}, {{x}})", saved=False)


@step("class token")
def class_token(w: Writer) -> None:
    w.need(w.state.channels_last and len(w.shape) == 2)
    name = w.parameter(1, 1, w.channels)
    w.run(f"torch.cat([{name}.expand(len({{x}}), -1, -1), {{x}}], 1)", saved=False)


@step("first token")
def first_token(w: Writer) -> None:
    w.need(len(w.shape) == 2)
    w.run("{x}[:, 0]", "{x}.select(1, 0)", fresh=False, channels_last=False)


@step("masked")
def masked(w: Writer) -> None:
    mask = w.make(f"(torch.arange({w.shape[-1]}) % 3 > 0)", "mask")
    w.run(f"{{x}} * {mask}", f"{{x}}.masked_fill(~{mask}, 0.0)", f"torch.where({mask}, {{x}}, 0.0)", saved=False)


@step("again")
def again(w: Writer, back: int = 1) -> None:
    """A module that was used before."""
    w.need(len(w.state.reusable) >= back)
    w.call(*w.state.reusable[-back])


STEPS |= {"again, second last": partial(again, back=2), "again, third last": partial(again, back=3)}


@step("gru")
def gru(w: Writer, code: str = "GRU({c}, 4") -> None:
    w.need(len(w.shape) == 2)
    name = w.make(f"nn.{code.format(c=w.shape[-1])}, batch_first=True)")
    w.run(f"{name}({{x}})[0]", channels_last=True)


STEPS |= {
    "lstm": partial(gru, code="LSTM({c}, 4"),
    "lstm, projected, both ways": partial(gru, code="LSTM({c}, 4, proj_size=2, bidirectional=True"),
    "rnn": partial(gru, code="RNN({c}, 4, 2, nonlinearity='relu'"),
}


@step("multihead attention")
def multihead(w: Writer) -> None:
    w.need(len(w.shape) == 2 and w.shape[-1] % 2 == 0)
    name = w.make(f"nn.MultiheadAttention({w.shape[-1]}, 2, batch_first=True)")
    w.run(f"{name}({{x}}, {{x}}, {{x}}, need_weights=False)[0]", f"{name}({{x}}, {{x}}, {{x}})[0]", saved=False)


@step("transformer layer")
def transformer(w: Writer) -> None:
    w.need(len(w.shape) == 2 and w.shape[-1] % 2 == 0)
    w.module(f"nn.TransformerEncoderLayer({w.shape[-1]}, 2, 8, activation='gelu', batch_first=True)", saved=False)


@step("attention")
def attention(w: Writer) -> None:
    """softmax(Q K^T / sqrt(C)) V with linear layers."""
    w.need(len(w.shape) == 2)
    size = w.shape[-1]
    q, k, v = (w.make(f"nn.Linear({size}, 4)") for _ in range(3))
    w.run(
        f"F.scaled_dot_product_attention({q}({{x}}), {k}({{x}}), {v}({{x}}))",
        f"({q}({{x}}) @ {k}({{x}}).mT / 2).softmax(-1) @ {v}({{x}})",
        f"torch.bmm(torch.softmax(torch.bmm({q}({{x}}), {k}({{x}}).transpose(1, 2)) * 0.5, -1), {v}({{x}}))",
        f"torch.einsum('nij,njc->nic', ({q}({{x}}) / 2 @ {k}({{x}}).mT).softmax(2), {v}({{x}}))",
        f"torch.einsum('nic,njc->nij', {q}({{x}}) / 2, {k}({{x}})).softmax(2) @ {v}({{x}})",
        saved=False,
    )


# ---------------------------------------------------------------------------------------------------------- blocks


def both(w: Writer, first: Sequence[Step], second: Sequence[Step]) -> tuple[str, str]:
    return w.branch(first), w.branch(second)


@block("residual")
def residual(w: Writer, steps: Sequence[Step]) -> None:
    y, x = w.branch(steps), w.state.x
    same_shape(w, x, y)
    if w.spelling == "in place" and w.branch_owned and y != x:
        w.run(f"{y}.add_({{x}})" if w.random.random() < 0.5 else f"torch.add({y}, {{x}}, out=None)", saved=False)
    else:
        w.run(f"{{x}} + {y}", f"torch.add({{x}}, {y})", f"{y} + {{x}}", f"sum([{{x}}, {y}])", saved=False)


def same_shape(w: Writer, *names: str) -> None:
    w.need(len({w.shape_of(name) for name in names}) == 1)


@block("concatenated")
def concatenated(w: Writer, first: Sequence[Step], second: Sequence[Step]) -> None:
    a, b = both(w, first, second)
    axis = -1 if w.state.channels_last else 1
    w.run(f"torch.cat([{a}, {b}], {axis})", f"torch.concat(({a}, {b}), dim={axis})", saved=False)


def combined(w: Writer, first: Sequence[Step], second: Sequence[Step], codes: str) -> None:
    """An expression of two branches {a} and {b} of one shape, and of what they come from, {x}."""
    a, b = both(w, first, second)
    same_shape(w, a, b)
    # Matrix products not across the batch, and an axis left.
    w.need(len(w.shape_of(a)) > 1 or not ("mT" in codes or "cosine" in codes))
    w.run(*(code.replace("{a}", a).replace("{b}", b) for code in codes.split(" | ")), saved=True)


COMBINED = {
    "difference": "{a} - {b} | torch.sub({a}, {b}) | {a}.sub({b}) | -({b} - {a})",
    "product": "{a} * {b} | torch.mul({a}, {b}) | {b}.mul({a}) | torch.addcmul(torch.zeros(()).to({a}), {a}, {b})",
    "gated": "{a} * {b}.sigmoid() | torch.sigmoid({b}) * {a}",
    "mixed": "{b}.sigmoid() * {a} + (1 - {b}.sigmoid()) * {x}",
    "lerp": "torch.lerp({a}, {b}, 0.3) | {a} + 0.3 * ({b} - {a}) | {a} * 0.7 + {b} * 0.3",
    "lerp by gate": "{a} + {b}.sigmoid() * ({x} - {a}) | torch.lerp({a}, {x}, {b}.sigmoid())",
    "added product": "{x} + {a} * {b} | torch.addcmul({x}, {a}, {b})",
    "added quotient": "{x} + {a} / (1 + {b} ** 2) | torch.addcdiv({x}, {a}, 1 + {b} ** 2)",
    "cosine": "F.cosine_similarity({a}, {b}, 1)",
    "quotient": "{a} / (1 + {b} ** 2) | torch.div({a}, {b}.square() + 1) | {a}.div(1 + {b} * {b})",
    "maximum": "torch.maximum({a}, {b}) | torch.max({a}, {b}) | {b}.maximum({a})",
    "minimum": "torch.minimum({a}, {b}) | torch.min({a}, {b})",
    "clamped by": "torch.minimum({a}, {b}) | {a}.clamp(max={b}) | torch.clamp({a}, max={b})",
    "stacked": "torch.stack([{a}, {b}], 1).mean(1) | torch.stack([{a}, {b}]).mean(0) | ({a} + {b}) / 2",
    "matmul": "{a} @ {b}.mT | torch.matmul({a}, {b}.transpose(-1, -2)) | torch.einsum('...ic,...jc->...ij', {a}, {b})",
    "attended": "({a} @ {b}.mT).softmax(-1) @ {b} | F.scaled_dot_product_attention({a}, {b}, {b}, scale=1.0)",
}
BLOCKS |= {name: partial(combined, codes=codes) for name, codes in COMBINED.items()}


@block("bilinear")
def bilinear(w: Writer, first: Sequence[Step], second: Sequence[Step]) -> None:
    a, b = both(w, first, second)
    size, other = (w.shape_of(name)[-1] for name in (a, b))
    name = w.make(f"nn.Bilinear({size}, {other}, 3)")
    w.run(f"{name}({a}, {b})", f"F.bilinear({a}, {b}, {name}.weight, {name}.bias)", saved=False)


@block("squeezed")
def squeezed(w: Writer, steps: Sequence[Step]) -> None:
    """Channels scaled by a gate that the steps make of the means."""
    w.need(w.spatial == 2)
    gate = w.branch(("global_avg_pool", *steps, "sigmoid"))
    w.need(w.shape_of(gate) == (w.channels, 1, 1))
    w.run(f"{{x}} * {gate}", f"{gate} * {{x}}", in_place=[f"{{x}} *= {gate}"], saved=False)


ONE_BRANCH = ("residual", "squeezed")
# Steps that add constants to activations, which keep relevance; no site accounts for it.
CONSTANTS = set(
    "shifted;complement;position;class token;padded by ones;root;reciprocal;log;mixed;at least 0.1;bilinear;gru;lstm;"
    "lstm, projected, both ways;rnn".split(";")  # the last four: of their first state
)

"""What models return besides scores, and target functions that want it."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from contracts import LEARNED, METHODS, OPTIMISED, explain
from nets import images, seeded
from torch import Tensor, nn

import attrbox
from attrbox.core.outputs import unwrap
from attrbox.errors import ModelError, TargetError

X = images(3, 3, 8, 8)
Pair = namedtuple("Pair", ["logits", "age"])


@dataclass
class Answer:
    logits: Tensor
    age: Tensor


class Two(nn.Module):
    """Logits of as many classes as there are images, and an age."""

    def __init__(self, pack):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))
        self.logits, self.age = nn.Linear(4, 3), nn.Linear(4, 1)
        self.pack = pack

    def forward(self, x):
        features = self.trunk(x).relu().mean((2, 3))
        return self.pack(self.logits(features), self.age(features)[:, 0])


def two(pack) -> nn.Module:
    return seeded(lambda: Two(pack))


@dataclass(frozen=True, slots=True)
class Slotted:
    logits: Tensor
    age: Tensor


class ByHand:
    __slots__ = ("age", "logits")

    def __init__(self, logits, age):
        self.logits, self.age = logits, age


PACKS = {
    "frozen, with slots": (Slotted, lambda out: out.age),
    "slots by hand": (ByHand, lambda out: out.age),
    "read-only mapping": (lambda logits, age: MappingProxyType({"logits": logits, "age": age}), lambda out: out["age"]),
    "tuple": (lambda logits, age: (logits, age), lambda out: out[1]),
    "list": (lambda logits, age: [logits, age], lambda out: out[1]),
    "dictionary": (lambda logits, age: {"logits": logits, "age": age}, lambda out: out["age"]),
    "ordered": (lambda logits, age: OrderedDict(out=logits, age=age), lambda out: out["age"]),
    "named tuple": (Pair, lambda out: out.age),
    "object": (Answer, lambda out: out.age),
    "nested": (lambda logits, age: {"heads": [logits, (age, None)]}, lambda out: out["heads"][1][0]),
    "tensor": (lambda logits, age: torch.cat([logits, age[:, None]], 1), lambda out: out[:, 3]),
}
# The losses of these weigh the mask against the score alone, so they serve any target alike; the rest is linear in it.
AGE = {name: two(lambda logits, age: age[:, None]) for name in ("alone",)}["alone"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pack", PACKS)
def test_a_function_takes_any_part_of_what_the_model_returns(method, pack):
    if pack not in ("tuple", "object") and method in LEARNED | OPTIMISED:
        pytest.skip("slow, and the spellings differ in nothing that these methods see")
    wrap, target = PACKS[pack]
    wanted = explain(AGE, X, method, target=lambda out: out[:, 0])
    maps = explain(two(wrap), X, method, target=target)
    torch.testing.assert_close(maps.score, wanted.score)
    torch.testing.assert_close(maps.values, wanted.values)
    if wanted.expected is not None:
        torch.testing.assert_close(maps.expected, wanted.expected)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("method", ["saliency", "deeplift", "integrated_gradients", "occlusion", "grad_cam"])
def test_chunks(method, batch_size):
    wrap, target = PACKS["dictionary"]
    whole = explain(two(wrap), X, method, target=target)
    torch.testing.assert_close(explain(two(wrap), X, method, target=target, batch_size=batch_size).values, whole.values)


@pytest.mark.parametrize(
    "method", ["deeplift", "lrp_epsilon", "guided_backprop", "grad_cam", "integrated_gradients", "occlusion"]
)
def test_something_of_its_own_for_each_image(method):
    labels = torch.tensor([2, 0, 1])
    target = lambda out: out[0][torch.arange(3), labels]  # noqa: E731
    wanted = explain(two(PACKS["tuple"][0]), X, method, target=labels)
    torch.testing.assert_close(
        explain(two(PACKS["tuple"][0]), X, method, target=target).values, wanted.values, equal_nan=True
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda out: out[0][0], "depends on what the model returned for other images"),
        (lambda out: out[0].mean(0), "for other images"),
        (lambda out: out[1] - out[1].mean(), "for other images"),
        (lambda out: out[0][:, 0].roll(1), "for other images"),
        (lambda out: torch.cat([out[1][:2], out[1][:1]]), "for other images"),
        (lambda out: torch.cat([out[1][:2], out[1][2:].detach() * 0 + 1]), None),
        (
            lambda out: torch.cat([out[1][:2], torch.ones(1, dtype=torch.float64)]),
            "score of image 2 .* does not depend",
        ),
        (lambda out: out[1].sum(), "return 3 scores"),
        (lambda out: out[1][:2], "return 3 scores"),
        (lambda out: out["age"], r"raised TypeError.*tuple of \['tensor \[3, 3\]', 'tensor \[3\]'\]"),
        (lambda out: out[2], "raised IndexError"),
        (lambda out: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda out: out[1] + torch.rand(3, dtype=torch.float64), "other scores the second time"),
    ],
)
@pytest.mark.parametrize("method", ["saliency", "deeplift", "occlusion"])
def test_functions_that_give_no_score_for_each_image(target, message, method):
    model = two(PACKS["tuple"][0])
    if message is None:  # depends on it, with a slope of 0
        assert explain(model, X, method, target=target).values[2].abs().max() == 0
        return
    with pytest.raises(TargetError, match=message) as caught:
        explain(model, X, method, target=target)
    if "raised" in message:
        assert caught.value.__cause__ is not None
    assert "images 0 to 2" in " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


@pytest.mark.parametrize(
    "target",
    [
        lambda out: torch.where(out[0] > 0, out[0], 0 * out[0])[:, 1],  # dead for some images
        lambda out: out[0][:, 0].clamp(max=-1e3),
        lambda out: out[0].nan_to_num()[:, 0],
        lambda out: out[0].softmax(1)[:, 0],
        lambda out: out[0].topk(2, 1).values,
        lambda out: out[0].log_softmax(1).gather(1, torch.tensor([[0], [1], [2]])),
    ],
)
def test_functions_that_keep_images_apart(target):
    maps = explain(two(PACKS["tuple"][0]), X, "saliency", target=target)
    assert maps.values.isfinite().all()


def test_a_function_that_refuses_nan():
    def target(out):
        if out[0].isnan().any():
            raise ValueError("no NaN here")
        return out[0][:, 1]

    model = two(PACKS["tuple"][0])
    wanted = explain(model, X, "saliency", target=1).values
    assert torch.equal(explain(model, X, "saliency", target=target).values, wanted)


@pytest.mark.parametrize("name", ["tuple", "object"])
def test_a_function_of_the_scores_alone_works_with_a_warning(name):
    model = two(PACKS[name][0])
    with pytest.warns(FutureWarning, match="take them out itself"):
        maps = explain(model, X, "deeplift", target=lambda out: out[:, 2])
    torch.testing.assert_close(maps.values, explain(model, X, "deeplift", target=2).values)


def test_metrics_take_the_same_functions():
    wrap, target = PACKS["tuple"]
    maps = attrbox.compare(two(wrap), X, ["deeplift", "saliency"], target=target, progress=False)
    wanted = attrbox.compare(AGE, X, ["deeplift", "saliency"], target=lambda out: out[:, 0], progress=False)
    chosen = [("deletion", {"score": "logit"}), "completeness", "infidelity"]
    found = attrbox.evaluate(two(wrap), X, maps, chosen, target=target, progress=False)
    other = attrbox.evaluate(AGE, X, wanted, chosen, target=lambda out: out[:, 0], progress=False)
    for label in found:
        for metric in found[label]:
            torch.testing.assert_close(found[label][metric].values, other[label][metric].values, equal_nan=True)


class Squeezing(nn.Module):
    """Drops the batch axis of a single image."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).squeeze()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scores", ["classes", "one"])
def test_a_model_that_squeezes_a_batch_of_one(method, scores):
    model = two(lambda logits, age: logits) if scores == "classes" else AGE
    if scores == "one" and method in LEARNED | OPTIMISED:
        pytest.skip("slow, and nothing else than with classes")
    wanted = explain(model, X, method, batch_size=1)
    torch.testing.assert_close(explain(Squeezing(model), X, method, batch_size=1).values, wanted.values)
    torch.testing.assert_close(explain(Squeezing(model), X[:1], method).values, explain(model, X[:1], method).values)


class SqueezingAll(nn.Module):
    """Drops the batch axis of a single image in all that it returns."""

    def __init__(self, pack):
        super().__init__()
        self.two, self.pack = two(lambda logits, age: (logits, age)), pack

    def forward(self, x):
        logits, age = self.two(x)
        return self.pack(logits.squeeze(0), age.squeeze())


@pytest.mark.parametrize("method", ["saliency", "deeplift", "lrp_epsilon", "grad_cam", "occlusion", "smoothgrad"])
@pytest.mark.parametrize("pack", PACKS)
def test_functions_of_what_a_model_squeezes(method, pack):
    wrap, target = PACKS[pack]
    if pack == "tensor":
        wrap = lambda logits, age: torch.cat([logits, age[..., None]], -1)  # noqa: E731
    wanted = explain(two(PACKS["tuple"][0]), X, method, target=lambda out: out[1])
    for batch_size in (1, 2):  # the last chunk is of one image
        maps = explain(SqueezingAll(wrap), X, method, target=target, batch_size=batch_size)
        torch.testing.assert_close(maps.score, wanted.score)
        torch.testing.assert_close(maps.values, wanted.values)


@pytest.mark.parametrize("batch_size", [1, 2, None])
@pytest.mark.parametrize(
    "target",
    [
        lambda out: out[1] - out[1].mean(),
        lambda out: out[0].softmax(0)[:, 0],
        lambda out: out[1].cumsum(0),
        lambda out: out[1] / out[1].norm(),
        lambda out: out[0][:, 0] - out[0][:1, 1],
    ],
)
@pytest.mark.parametrize("method", ["saliency", "deeplift", "occlusion"])
def test_functions_that_mix_images_are_refused_in_chunks_of_any_size(method, target, batch_size):
    with pytest.raises(TargetError, match="for other images"):
        explain(two(PACKS["tuple"][0]), X, method, target=target, batch_size=batch_size)


def test_a_function_for_one_image_alone():
    label = torch.tensor([[2]])
    model = two(PACKS["tuple"][0])
    maps = explain(model, X[:1], "deeplift", target=lambda out: out[0].gather(1, label))
    torch.testing.assert_close(maps.values, explain(model, X[:1], "deeplift", target=2).values)


def of_one(out):
    if len(out[1]) != 1:
        raise ValueError("one image at a time")
    return out[1]


def test_a_function_that_takes_one_image_at_a_time():
    wanted = explain(AGE, X, "saliency", target=lambda out: out[:, 0])
    maps = explain(two(PACKS["tuple"][0]), X, "saliency", target=of_one, batch_size=1)
    torch.testing.assert_close(maps.values, wanted.values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "target",
    [lambda out: out[1].mul_(2), lambda out: out[1].neg_().neg_().add_(out[1]), lambda out: doubled_inside(out)],
)
def test_functions_may_write_into_what_they_get(method, target):
    if method in LEARNED | OPTIMISED:
        pytest.skip("slow, and nothing else than for the others")
    model = two(PACKS["tuple"][0])
    maps = explain(model, X, method, target=target)
    wanted = explain(model, X, method, target=lambda out: 2 * out[1])
    torch.testing.assert_close(maps.score, wanted.score)
    torch.testing.assert_close(maps.values, wanted.values)


def doubled_inside(out):
    out[1][:] = 2 * out[1]
    return out[1]


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (lambda out: torch.complex(out[1], out[1]), "torch.complex128"),
        (lambda out: out[0].argmax(1), "torch.int64"),
        (lambda out: out[1] > 0, "torch.bool"),
        (lambda out: out[1].tolist(), "list"),
        (lambda out: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("method", ["saliency", "deeplift", "occlusion"])
def test_scores_of_other_kinds(method, target, kind):
    with pytest.raises(TargetError, match=f"as floating-point numbers, got {kind}"):
        explain(two(PACKS["tuple"][0]), X, method, target=target)


def test_a_model_that_mixes_up_its_batch_axis():
    class Transposed(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)).T

    with pytest.raises(ModelError, match=r"one row of outputs per image, 1 in all, got \[3, 1\]"):
        explain(Transposed().eval(), X[:1], "saliency")


def test_refusals_tell_what_came():
    with pytest.raises(ModelError, match=r"got a tensor of torch.int64, \[3, 3\]"):
        unwrap(torch.zeros(3, 3, dtype=torch.int64))
    model = two(PACKS["tuple"][0])
    with pytest.raises(TargetError, match="score of image 1 of a batch of 3 depends on"):
        explain(model, X, "saliency", target=lambda out: out[1][[0, 0, 2]])

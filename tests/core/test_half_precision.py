"""Models and images in float16 and bfloat16: the maps are those of float32, of the same numbers."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import FAST, images, relu_net, residual_net, seeded
from snapshots import nothing_changes
from torch import Tensor, nn

import attrbox
from attrbox.core.hashing import known_weights_hash
from attrbox.core.model_state import _writes, untouched
from attrbox.core.targets import Target
from attrbox.errors import AttrboxError, ForwardError, ModelError
from attrbox.methods.context.passes import Settings
from attrbox.methods.context.run import Run

HALVES = [torch.float16, torch.bfloat16]
METHODS = [name for name, spec in attrbox.method_registry.items() if not spec.required]
X, M = images(2, 3, 8, 8), torch.ones(2, 2)
SOME = ["saliency", "deeplift", "deep_taylor", "epsilon_gamma_box", "epsilon_plus", "smoothgrad", "learned", "rise"]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.qkv = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.mlp(x)).mean(1))


def without_bias(seed: int) -> nn.Module:
    """The head alone has a bias, so that sums of products may vanish."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        ),
        seed,
    )


NETS: dict[str, Callable[[int], nn.Module]] = {
    "pools": lambda seed: relu_net(pool=True, seed=seed),
    "without bias": without_bias,
    "residual": lambda seed: residual_net(seed),
    "attention": lambda seed: seeded(Transformer, seed),
}


def maps(model: object, x: Tensor, method: str, **options: object) -> attrbox.Attribution:
    options = {"target": 1, "progress": False} | FAST.get(method, {}) | options
    return attrbox.explain(model, x, method, **options)  # type: ignore[arg-type]


def both(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A model in half precision, and in float32 with the same numbers."""
    half = model.to(dtype)
    return half, copy.deepcopy(half).float()


def same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_maps_are_those_of_float32(method: str, net: str, dtype: torch.dtype) -> None:
    if attrbox.method_registry[method].only_for and net != "attention":
        pytest.skip(attrbox.method_registry[method].only_for)
    for seed in range(3):
        half, full = both(NETS[net](seed), dtype)
        x = images(2, 3, 8, 8, seed=seed, dtype=dtype)
        found, wanted = maps(half, x, method), maps(full, x.float(), method)
        same(found.values, wanted.values)
        same(found.score, wanted.score)
        if wanted.gap is not None:
            torch.testing.assert_close(found.gap, wanted.gap, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("method", SOME)
def test_signals_far_from_1(method: str, scale: float) -> None:
    """Relevance beyond the range of float16, and gradients below it."""
    model = relu_net(pool=True)
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        model[0].weight.mul_(scale)
    half, full = both(model, torch.float16)
    x = images(2, 3, 8, 8, dtype=torch.float16)
    same(maps(half, x, method).values, maps(full, x.float(), method).values)


class Inside(nn.Module):
    """In half precision within, though its images and scores are not."""

    def __init__(self, inner: nn.Module, cast: Callable[[Tensor, torch.dtype], Tensor]) -> None:
        super().__init__()
        self.inner, self.cast = inner, cast

    def forward(self, x: Tensor) -> Tensor:
        dtype = next(self.inner.parameters()).dtype
        return self.inner(self.cast(x, dtype)).float()


CASTS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "half": lambda x, dtype: x.half(),
    "bfloat16": lambda x, dtype: x.bfloat16(),
    "to": lambda x, dtype: x.to(dtype),
    "to by name": lambda x, dtype: x.to(dtype=torch.float16),
    "type": lambda x, dtype: x.type(torch.bfloat16),
    "new": lambda x, dtype: torch.zeros(x.shape, dtype=torch.float16) + x,
    "sum": lambda x, dtype: x.unsqueeze(0).sum(0, dtype=torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("method", SOME)
def test_half_precision_inside(method: str, cast: str) -> None:
    half, full = both(relu_net(), torch.float16)
    x = images(2, 3, 8, 8, dtype=torch.float16).float()
    same(maps(Inside(half, CASTS[cast]).eval(), x, method).values, maps(full, x, method).values)


class Constant(nn.Module):
    """Weights that are no parameters, and a note of its outputs, which it reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = images(6, 3, 3, 3).half(), nn.Linear(6, 4)
        self.note = torch.zeros(2, 6).half()

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight).relu().mean((2, 3))
        self.note[:] = 2 * y.detach()
        self.note += 1
        return self.head(y * self.note.clone())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(24, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.transpose(1, 2).flatten(2))[0].mean(1))


@pytest.mark.parametrize("build", [Constant, Recurrent])
@pytest.mark.parametrize("method", ["saliency", "deeplift", "epsilon_plus"])
def test_weights_in_other_places(method: str, build: Callable[[], nn.Module]) -> None:
    half = seeded(build, dtype=torch.float16)
    full = copy.deepcopy(half).float()
    if isinstance(full, Constant):
        full.weight, full.note = full.weight.float(), full.note.float()
    x = images(2, 3, 8, 8, dtype=torch.float16)
    found, wanted = maps(half, x, method), maps(full, x.float(), method)
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-2, atol=1e-3)  # the note itself stays in half


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit is deprecated
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, images(2, 3, 8, 8).half())])
@pytest.mark.parametrize("method", ["saliency", "smoothgrad", "occlusion"])
def test_scripted(method: str, make: Callable[[nn.Module], nn.Module]) -> None:
    half, full = both(relu_net(), torch.float16)
    x = images(2, 3, 8, 8, dtype=torch.float16)
    same(maps(make(half), x, method).values, maps(full, x.float(), method).values)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_callable_gets_its_own_dtype(dtype: torch.dtype) -> None:
    half, full = both(relu_net(), dtype)
    seen = set()

    def function(x: Tensor) -> Tensor:
        seen.add(x.dtype)
        return half(x)

    x = images(2, 3, 8, 8, dtype=dtype)
    found = maps(function, x, "occlusion").values
    assert seen == {dtype}
    torch.testing.assert_close(found, maps(full, x.float(), "occlusion").values, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_model_stays_in_half_precision(method: str, dtype: torch.dtype) -> None:
    model = NETS["attention" if attrbox.method_registry[method].only_for else "residual"](0).to(dtype)
    model.register_parameter("tied", model.head.weight)
    model.register_forward_pre_hook(lambda model, _: None if model.tied is model.head.weight else 1 / 0)
    x = images(2, 3, 8, 8, dtype=dtype)
    with nothing_changes(model, x):
        maps(model, x, method)
        with pytest.raises(AttrboxError):
            maps(model, x, method, target=17)


def test_methods_do_not_change_for_their_neighbors() -> None:
    half = relu_net(dtype=torch.bfloat16)
    x = images(2, 3, 8, 8, dtype=torch.bfloat16)
    together = attrbox.compare(half, x, [(name, FAST.get(name, {})) for name in SOME], target=1, progress=False)
    for method in SOME:
        assert torch.equal(together[method].values, maps(half, x, method).values)


@pytest.mark.parametrize("precision", HALVES, ids=str)
def test_mixed_precision_of_a_model_in_half(precision: torch.dtype) -> None:
    """Automatic mixed precision then works as for a float32 model."""
    half, full = both(relu_net(), precision)
    x = images(2, 3, 8, 8, dtype=precision)
    for method in ("smoothgrad", "occlusion", "deeplift"):
        found = maps(half, x, method, precision=precision).values
        same(found, maps(full, x.float(), method, precision=precision).values)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith(("learned", "lime"))])
def test_mixed_precision_in_float16(method: str, scale: float) -> None:
    """Gradients and relevance below its range or beyond it: they are taken in float32, or scaled."""
    for net in ("attention",) if attrbox.method_registry[method].only_for else NETS:
        model = NETS[net](0).float()
        with torch.no_grad():
            for parameter in list(model.parameters())[-2:]:  # of the head
                parameter.mul_(scale)
        x = images(2, 3, 8, 8, dtype=torch.float32)
        found, wanted = (maps(model, x, method, precision=dtype).values for dtype in (torch.float16, None))
        assert found.isfinite().all()
        assert (found - wanted).norm() <= 0.05 * wanted.norm(), net


class Cutting(attrbox.Rule):
    """Notes what it gets."""

    kinds = frozenset({"relu"})
    needs = frozenset({"input", "output", "derivative"})

    def __init__(self) -> None:
        self.seen: set[object] = set()

    def propagate(self, site: attrbox.Site, grad_output: Tensor) -> Tensor:
        self.seen |= {site.input.dtype, site.output.dtype, grad_output.dtype, torch.mm(M, M).dtype}
        return site.true_gradient(grad_output)


class Autocasting(nn.Module):
    """A model with mixed precision of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = relu_net(dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


@pytest.mark.parametrize("own", [False, True])
def test_rules_are_computed_in_float32(own: bool) -> None:
    rule = Cutting()
    x = images(2, 3, 8, 8, dtype=torch.float32)
    model = Autocasting().eval() if own else relu_net(dtype=torch.float32)
    settings = Settings(Target(1, 2), (0,), None if own else torch.bfloat16)
    with untouched(model):
        Run(model, x, settings, slice(0, 2), 2, [rule]).gradient(rule)
    assert rule.seen == {torch.float32}


@pytest.mark.parametrize("method", ["saliency", "deeplift", "epsilon_gamma_box"])
def test_on_the_meta_device(method: str) -> None:
    model = nn.Sequential(Constant()).eval().half().to("meta")
    model[0].weight, model[0].note = model[0].weight.to("meta"), model[0].note.to("meta")
    assert maps(model, X[:2].half().to("meta"), method).values.shape == (2, 3, 8, 8)


def test_a_model_that_cannot_be_widened_is_told() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float16:
                raise TypeError("half only")
            return x.mean((2, 3))

    with pytest.raises(ForwardError, match="half only") as raised:
        maps(Strict().eval(), images(2, 3, 8, 8, dtype=torch.float16), "saliency")
    assert any("float32" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("metrics", [["deletion", "insertion"], ["completeness", "sensitivity_max"]])
def test_metrics(metrics: list[str]) -> None:
    half, full = both(relu_net(), torch.float16)
    x = images(3, 3, 8, 8, dtype=torch.float16)
    methods = ["deeplift", "epsilon_gamma_box"]
    scores = []
    for model, given in ((half, x), (full, x.float())):
        result = attrbox.compare(model, given, methods, target=1, progress=False)
        found = attrbox.evaluate(model, given, result, metrics, progress=False)
        scores.append([found[method][metric].values for method in methods for metric in metrics])
    for found, wanted in zip(*scores, strict=True):
        assert wanted.isfinite().all()
        torch.testing.assert_close(found, wanted)


def test_the_doctor_and_patterns() -> None:
    half, full = both(relu_net(), torch.float16)
    x = images(6, 3, 8, 8, dtype=torch.float16)
    verdicts = [
        {finding.method: finding.verdict for finding in attrbox.doctor(model, given).findings}
        for model, given in ((half, x), (full, x.float()))
    ]
    assert verdicts[0] == verdicts[1]
    found = [
        maps(model, given, "pattern_attribution", patterns=attrbox.fit_patterns(model, given, progress=False))
        for model, given in ((half, x), (full, x.float()))
    ]
    same(found[0].values, found[1].values)


def test_patterns_of_other_weights_are_refused() -> None:
    """Float32 copies lie where those of the last call lay: their hash must not be remembered by their place."""
    half = relu_net(dtype=torch.float16)
    x = images(2, 3, 8, 8, dtype=torch.float16)
    patterns = attrbox.fit_patterns(half, x, progress=False)
    for _ in range(5):
        maps(half, x, "pattern_net", patterns=patterns)
    with torch.no_grad():
        half[0].weight.mul_(2)
    with pytest.raises(ModelError, match="other weights"):
        maps(half, x, "pattern_net", patterns=patterns)


def test_a_freed_tensor_is_another_one() -> None:
    model = nn.Linear(2, 2)
    marked = known_weights_hash(model)
    storage = torch.zeros(2, 2).untyped_storage()
    hashes = set()
    for value in (1.0, 2.0):
        storage.fill_(0)
        model.weight = nn.Parameter(torch.empty(0).set_(storage, 0, (2, 2)), requires_grad=False)
        torch.frombuffer(model.weight.numpy(), dtype=torch.float32)[:] = value  # unseen by version counters
        hashes.add(known_weights_hash(model))
    assert len(hashes | {marked}) == 3


@pytest.mark.parametrize(
    ("name", "writes"),
    [
        ("add_", True),
        ("copy_", True),
        ("__setitem__", True),
        ("__iadd__", True),
        ("__imul__", True),
        ("add", False),
        ("__add__", False),
        ("__getitem__", False),
        ("relu", False),
    ],
)
def test_what_writes_into_its_first_argument_keeps_it(name: str, writes: bool) -> None:
    assert _writes(name) == writes


@pytest.mark.parametrize("method", [name for name in METHODS if not name.endswith("rollout")])
def test_an_autocast_around_the_call_counts_as_its_precision(method):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), Mean())).float()
    x = images(2, 3, 8, 8).float()
    options = {"target": 1, "progress": False} | FAST.get(method, {})
    wanted = attrbox.explain(model, x, method, precision=torch.bfloat16, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = attrbox.explain(model, x, method, **options)
        assert torch.is_autocast_enabled("cpu")
    assert found.values.dtype == torch.float32
    assert found.provenance == wanted.provenance
    assert torch.equal(found.values, wanted.values)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("inside", [False, True])
def test_metrics_measure_in_the_models_precision(default, inside):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Mean())).float()
    x = images(2, 3, 8, 8).float()
    maps = attrbox.compare(model, x, ["saliency"], target=1, progress=False)
    metrics = ["morf", "deletion", "road", "infidelity", "sensitivity_max"]
    wanted = attrbox.evaluate(model, x, maps, metrics, progress=False)
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found = attrbox.evaluate(model, x, maps, metrics, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    for metric in metrics:
        torch.testing.assert_close(found["saliency"][metric].values, wanted["saliency"][metric].values)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))

"""The doctor's verdicts, strict mode, and models written in other styles than torchvision's."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from nets import TRANSFORMERS, images, relu_net, residual_net, seeded, vector_net
from snapshots import nothing_changes
from torch import Tensor, nn
from typer.testing import CliRunner

import attrbox
from attrbox.errors import ForwardError, InputError, UnknownNameError, UnsupportedModelError
from attrbox.methods.diagnosis import Diagnosis, Finding
from attrbox.pipeline.cli import app

X = images(2, 3, 8, 8)


# ----------------------------------------------------------------------------------------------- models of other styles


class Lambdas(nn.Module):
    """Operations kept in lists and methods, weights in plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(3 * 64, 12) / 14), nn.Parameter(torch.randn(12, 4))])
        self.steps = [lambda z: z @ self.weights[0], self.squash, lambda z: z.matmul(self.weights[1])]

    def squash(self, z: Tensor) -> Tensor:
        return z.clamp(min=0) + 0.1 * z.abs().sqrt()

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)
        for step in self.steps:
            z = step(z)
        return z


class Reused(nn.Module):
    """One layer, one activation and one norm, used again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.layer, self.norm = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
        )
        self.act, self.head = nn.GELU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        for _ in range(3):
            x = self.act(self.norm(self.layer(x)))
        return self.head(x.amax((2, 3)))


class InPlace(Reused):
    """Residuals added, scaled and clipped in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inside(x), inplace=True)
        for _ in range(2):
            y = self.layer(x)
            y *= 0.5
            y += x
            y.relu_()
            x = y / (y.mean((1, 2, 3), keepdim=True) + 1)
        return self.head(x.mean((2, 3)))


class Dictionary(Reused):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.inside(x).relu()
        return {"features": features, "logits": self.head(features.mean((2, 3)))}


class Logits(Reused):
    """As Hugging Face's: an object with `.logits`."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> types.SimpleNamespace:
        tokens = self.inside(pixel_values).flatten(2).transpose(1, 2)
        tokens = tokens + F.scaled_dot_product_attention(tokens, tokens, F.layer_norm(tokens, (4,)))
        return types.SimpleNamespace(loss=None, logits=self.head(tokens.mean(1)), hidden_states=(tokens,))


class SeveralInputs(nn.Module):
    """Called with one: the others are fixed by a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.other, self.head = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Linear(4, 4)
        self.register_buffer("context", torch.randn(1, 5))

    def joined(self, x: Tensor, context: Tensor) -> Tensor:
        return self.inside(x).relu().mean((2, 3)) * self.other(context).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.joined(x, self.context))


class Recurrent(nn.Module):
    """The same cell over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(24, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 6)
        for row in x.transpose(1, 2).flatten(2).unbind(1):
            state = self.cell(row, state)
        return self.head(state)


STYLES = {
    "lambdas": Lambdas,
    "reused": Reused,
    "in place": InPlace,
    "dictionary": Dictionary,
    "logits": Logits,
    "several inputs": SeveralInputs,
    "recurrent": Recurrent,
}
CAM = {"grad_cam", "guided_grad_cam", "grad_cam_plus_plus", "layer_cam"}
ROLLOUT = {"attention_rollout", "gradient_rollout"}


@pytest.mark.parametrize("style", STYLES)
def test_models_of_other_styles(style):
    model = seeded(STYLES[style])
    with nothing_changes(model, X):
        diagnosis = attrbox.doctor(model, X)
    assert not diagnosis.unknown
    for finding in diagnosis.findings:
        if finding.method in ROLLOUT and style != "logits":
            assert finding.verdict == "refused"
        elif finding.method in CAM and style in ("lambdas", "recurrent"):
            assert finding.verdict == "refused"
            assert "no spatial feature map" in finding.reason
        elif finding.method in {*CAM, "deep_taylor"} and finding.verdict == "not tested":
            assert not finding.maps.values.any()
        elif not finding.method.startswith("learned"):
            assert finding.verdict == "exact", finding
    for baseline in (0.0, images(3, 8, 8, seed=5), images(2, 3, 8, 8, seed=6)):
        maps = attrbox.explain(model, X, "deeplift", target=1, baseline=baseline, strict=True)
        assert (maps.gap.abs() / maps.values.abs().flatten(1).sum(1)).max() < 1e-10
    whole = attrbox.explain(model, X, "deeplift", target=1).values
    torch.testing.assert_close(attrbox.explain(model, X[:1], "deeplift", target=1).values, whole[:1])


# ----------------------------------------------------------------------------------------------------------- the doctor


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.atan(self.inside(x).relu()).mean((2, 3)))


def test_what_is_not_understood_makes_a_verdict_approximate_and_strict_refuses_it():
    model = seeded(Unknown)
    diagnosis = attrbox.doctor(model, X)
    assert diagnosis.unknown == {"atan": 1}
    assert diagnosis.operations["relu"] == 1
    assert diagnosis["deeplift"].verdict == "approximate"
    assert "atan" in diagnosis["deeplift"].reason
    assert diagnosis["saliency"].verdict == "exact"
    assert "Not understood: 1 atan." in diagnosis.table()
    for call in (
        lambda: attrbox.explain(model, X, "deeplift", strict=True),
        lambda: attrbox.compare(model, X, ["saliency", "guided_backprop"], strict=True),
    ):
        with pytest.raises(UnsupportedModelError, match="atan"):
            call()
    assert attrbox.explain(model, X, "saliency", strict=True).values.isfinite().all()


def test_the_doctors_table():
    diagnosis = attrbox.doctor(residual_net(), X, ["deeplift", "e-LRP", "attention_rollout", "saliency"])
    assert [finding.verdict for finding in diagnosis.findings] == ["exact", "exact", "refused", "exact"]
    assert "complete to" in diagnosis["deeplift"].reason
    assert "absorb" in diagnosis["lrp_epsilon"].reason
    table = diagnosis.table()
    assert table.startswith("Non-linear operations: 5 relu.")
    assert table.count("\n") == 7


def test_every_method_that_looks_inside_is_tried():
    found = {finding.method for finding in attrbox.doctor(TRANSFORMERS["vit"](), images(1, 3, 16, 16)).findings}
    assert {"saliency", "deeplift", "guided_backprop", "epsilon_plus", "attn_lrp", "attention_rollout"} | CAM <= found
    assert not found & {"occlusion", "rise", "smoothgrad", "random"}


def test_an_incomplete_rule_is_found_out(monkeypatch):
    from attrbox.rules import deeplift

    monkeypatch.setitem(deeplift._EXACT, "norm", lambda site, grad: site.true_gradient(grad))
    diagnosis = attrbox.doctor(TRANSFORMERS["vit"](), images(1, 3, 16, 16), ["deeplift"])
    assert diagnosis["deeplift"].verdict == "approximate"


class Silent(nn.Module):
    """All scores are zero, or all are a constant: the last layer was not trained yet."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.inside, self.head = TRANSFORMERS["vit"](), nn.Linear(4, 4).double()
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, level)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(x)[:, :4])


def verdicts(diagnosis):
    return {finding.method: finding.verdict for finding in diagnosis.findings}


@pytest.mark.parametrize(
    ("model", "x", "but"),
    [
        (Silent(0.0), images(2, 3, 16, 16), set()),
        (Silent(1.0), images(2, 3, 16, 16), {"attention_rollout"}),  # which does not look at the scores
        (TRANSFORMERS["vit"](), images(2, 3, 16, 16)[:0], set()),
    ],
    ids=["zero scores", "empty maps", "no images"],
)
@pytest.mark.parametrize("target", [None, 1, attrbox.top(2), lambda scores: scores[:, 2]])
def test_where_the_images_tell_nothing_nothing_is_exact(model, x, but, target):
    diagnosis = attrbox.doctor(model.eval(), x, target=target)
    assert set(verdicts(diagnosis).values()) <= {"not tested", "exact"}
    assert {name for name, verdict in verdicts(diagnosis).items() if verdict == "exact"} == but
    assert all(finding.reason for finding in diagnosis.findings)
    assert not diagnosis.exact


def test_one_image_that_tells_something_is_enough():
    model = residual_net()
    x = torch.cat([X, X * 0])  # the baseline itself
    assert attrbox.doctor(model, x[:2], ["deeplift"]).exact
    assert attrbox.doctor(model, x, ["deeplift"]).exact
    finding = attrbox.doctor(model, x[2:], ["deeplift"])["deeplift"]
    assert (finding.verdict, finding.reason.split(".")[0]) == ("not tested", "the score is that of the baseline")


def test_an_empty_map_that_should_not_be_is_no_lack_of_tests(monkeypatch):
    from attrbox.methods.context.run import Run

    original = Run.gradient
    monkeypatch.setattr(Run, "gradient", lambda *args, **options: original(*args, **options) * 0)
    assert verdicts(attrbox.doctor(residual_net(), X, ["deeplift", "saliency"])) == {
        "deeplift": "approximate",
        "saliency": "not tested",
    }


@pytest.mark.parametrize("target", [None, attrbox.top(2), lambda scores: scores[:, 2]])
def test_a_recorded_score_that_is_another_is_found_out(monkeypatch, target):
    from attrbox.methods.context.passes import Passes

    original = Passes.recorded

    def other(*args, **options):
        tape = original(*args, **options)
        tape.output = tape.output + 1
        return tape

    monkeypatch.setattr(Passes, "recorded", other)
    finding = attrbox.doctor(residual_net(), X, ["guided_backprop"], target=target).findings[0]
    assert finding.verdict == "approximate"
    assert "recorded score" in finding.reason


class Mixed(nn.Module):
    """Scores that depend on the batch mates."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        match self.how:
            case "norm":
                return self.head(self.layers(x).mean((2, 3)))
            case "mean":
                return self.head(self.layers[2](self.layers[0](x - x.mean(0))).mean((2, 3)))
            case "softmax":
                return self.head(self.layers[2](self.layers[0](x)).mean((2, 3))).softmax(0)
            case "apart":
                return self.head(self.layers[2](self.layers[0](x)).mean((2, 3)))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("how", ["norm", "mean", "softmax", "apart"])
@pytest.mark.parametrize("target", [None, 1, lambda out: out[:, 1]])
def test_scores_that_depend_on_batch_mates(how, count, target):
    found = attrbox.doctor(seeded(lambda: Mixed(how)), images(count, 3, 8, 8), ["saliency", "gradient_x_input"], target)
    for finding in found.findings:
        if how == "apart":
            assert finding.verdict == "exact"
        else:
            assert finding.verdict == "approximate"
            assert "depend on the batch mates" in finding.reason


def test_the_map_of_a_score_that_is_not_positive_is_empty():
    model, x = relu_net(), X[:1]
    least = int(model(x).argmin())
    assert model(x)[0, least] < 0
    finding = attrbox.doctor(model, x, ["deep_taylor"], target=least)["deep_taylor"]
    assert (finding.verdict, finding.reason.split(".")[0]) == ("not tested", "no score is positive")
    assert not finding.maps.values.any()


def test_bad_input_and_models_that_do_not_run():
    with pytest.raises(InputError, match="floating-point"):
        attrbox.doctor(relu_net(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ForwardError):
        attrbox.doctor(relu_net(), images(1, 5))
    with pytest.raises(UnknownNameError):
        attrbox.doctor(relu_net(), X, ["deeplfit"])
    assert attrbox.doctor(vector_net(), images(1, 7), ["grad_cam"])["grad_cam"].verdict == "refused"


def test_the_command():
    result = CliRunner().invoke(app, ["doctor", "torchvision:squeezenet1_1", "--weights", "none", "--size", "48"])
    assert result.exit_code == 0, result.output
    assert "| deeplift | exact | complete to" in result.output
    assert "| attention_rollout | refused |" in result.output
    strict = ["doctor", "torchvision:squeezenet1_1", "--weights", "none", "--size", "48", "--strict"]
    assert CliRunner().invoke(app, strict).exit_code == 0
    missing = CliRunner().invoke(app, ["doctor", "torchvision:squeezenet9"])
    assert missing.exit_code == 2


@pytest.mark.parametrize(
    ("verdict", "method", "status"),
    [
        ("exact", "deeplift", 0),
        ("approximate", "deeplift", 1),
        ("not tested", "deeplift", 1),
        ("refused", "grad_cam", 1),
        ("refused", "attention_rollout", 0),  # meant for transformers
        ("approximate", "attention_rollout", 1),
    ],
)
def test_strict_exit_status(monkeypatch, verdict, method, status):
    found = Diagnosis((Finding("saliency", "exact", "as defined"), Finding(method, verdict, "why")))
    monkeypatch.setattr(sys.modules["attrbox.methods.diagnosis"], "doctor", lambda *arguments: found)
    command = ["doctor", "torchvision:squeezenet1_1", "--weights", "none"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, [*command, "--strict"]).exit_code == status

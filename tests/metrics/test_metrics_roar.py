"""ROAR and the training behind it."""

import csv
import json
import math

import pytest
import torch
from nets import images, relu_net
from snapshots import nothing_changes
from torch import Tensor, nn

import attrbox
from attrbox.core.random_streams import mixed
from attrbox.errors import FileError, InputError, ModelError, OptionError, TrainingError
from attrbox.metrics.faithfulness.roar import WHOLE, Cell, Roar
from attrbox.metrics.training import Trainer, accuracy, train, train_on_permuted_labels

QUICK = Trainer(epochs=15, batch_size=100, learning_rate=0.1, weight_decay=0.0)


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 2))


def problem(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """y = sign(x_0), the other seven numbers are noise."""
    x = images(count, 1, 2, 4, seed=seed, dtype=torch.float32)
    x[:, 0, 0, 0] = x[:, 0, 0, 0].sign() * (1 + x[:, 0, 0, 0].abs())
    return x, (x[:, 0, 0, 0] > 0).long()


TRAIN, TEST = problem(600, 0), problem(2000, 1)


def perfect(count: int) -> Tensor:
    maps = torch.zeros(count, 2, 4)
    maps[:, 0, 0] = 1
    return maps


MAPS = {"perfect": (perfect(600), perfect(2000)), "worst": (-perfect(600), -perfect(2000))}


def constant(model: nn.Module, x: Tensor, labels: Tensor, seed: int) -> None:
    """A trainer that leaves the weights as they are."""


def test_closed_forms_of_a_problem_with_one_informative_pixel():
    """Without it nothing is left to learn; at random it is gone in a fraction t of the images, half of which are then
    guessed: 1 - t / 2."""
    result = attrbox.roar(
        linear, TRAIN, TEST, MAPS, fractions=(0, 0.25, 0.75), seeds=(0, 1), trainer=QUICK, fill="zero", progress=False
    )
    assert result.mean("perfect", 0) == result.mean("random", 0) > 0.98
    for fraction in (0.25, 0.75):
        assert result.mean("perfect", fraction) == pytest.approx(0.5, abs=0.05)
        assert result.mean("worst", fraction) > 0.98
        assert result.mean("random", fraction) == pytest.approx(1 - fraction / 2, abs=0.04)
    assert result.methods == ("perfect", "worst", "random", "sobel")
    assert result.controls == ("random", "sobel")
    assert len(result.cells) == 2 * (1 + 4 * 2)
    assert all(len(result.accuracies(m, f)) == 2 for m in result.methods for f in result.fractions)


@pytest.mark.parametrize("fill", ["mean", "zero", -2.0])
def test_the_highest_ranked_pixels_of_both_sets_are_filled(fill):
    seen = []

    def trainer(model, x, labels, seed):
        seen.append(x)

    x, test = images(6, 2, 3, 3), images(4, 2, 3, 3, seed=1)
    labels, test_labels = torch.arange(6) % 2, torch.arange(4) % 2
    maps = {"m": (images(6, 3, 3, seed=2), images(4, 3, 3, seed=3))}
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 2, dtype=torch.float64))
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attrbox.roar(
        lambda: model, (x, labels), (test, test_labels), maps, fractions=(0.5,), seeds=(0,), trainer=trainer, fill=fill,
        controls=False, progress=False,
    )  # fmt: skip
    value = {"mean": x.mean((0, 2, 3)), "zero": torch.zeros(2)}.get(fill, torch.full((2,), -2.0)).double()
    for shown, original, heatmap in zip(seen, (x, test), maps["m"], strict=True):
        for index in range(len(original)):
            wanted = original[index].clone()
            for pixel in heatmap[index].flatten().topk(4).indices.tolist():  # round(4.5) is 4
                wanted[:, pixel // 3, pixel % 3] = value
            torch.testing.assert_close(shown[index], wanted)


def test_every_seed_trains_another_model():
    seeds = []
    attrbox.roar(
        lambda: seeds.append(torch.initial_seed()) or linear(), TRAIN, TEST, {"m": MAPS["perfect"]},
        fractions=(0.5,), seeds=(3, 4, 5), trainer=constant, controls=False, progress=False,
    )  # fmt: skip
    assert len(set(seeds)) == 3


def test_a_failing_trainer_loses_nothing_and_the_grid_goes_on_from_there(tmp_path):
    calls: list[int] = []
    options = {"fractions": (0, 0.5), "seeds": (0, 1), "controls": False, "folder": tmp_path, "progress": False}

    def failing(model, x, labels, seed):
        calls.append(seed)
        if len(calls) == 3:
            raise ZeroDivisionError("the disk is on fire")

    with pytest.raises(
        TrainingError, match=r"'worst' at 0.5, seed 0: ZeroDivisionError: the disk is on fire"
    ) as caught:
        attrbox.roar(linear, TRAIN, TEST, MAPS, trainer=failing, **options)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    finished = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(finished) == 2
    whole = attrbox.roar(linear, TRAIN, TEST, MAPS, trainer=failing, **options)
    assert len(calls) == 3 + 4  # the one that failed, and the three that are left of six
    assert all((tmp_path / name).read_bytes() == content for name, content in finished.items())
    again = attrbox.roar(lambda: 1 / 0, TRAIN, TEST, MAPS, trainer=failing, **options)  # nothing is trained
    assert again == whole
    assert [cell.method for cell in whole.cells[:3]] == [WHOLE, "perfect", "worst"]


def test_results_of_another_experiment_are_not_taken_for_this_one(tmp_path):
    options = {"fractions": (0.5,), "seeds": (0,), "controls": False, "folder": tmp_path, "progress": False}
    attrbox.roar(linear, TRAIN, TEST, MAPS, trainer=constant, **options)
    other = {"perfect": (MAPS["worst"][0], MAPS["perfect"][1])}
    with pytest.raises(FileError, match="other images, maps or fill"):
        attrbox.roar(linear, TRAIN, TEST, other, trainer=constant, **options)
    with pytest.raises(FileError, match="other images, maps or fill"):
        attrbox.roar(linear, TRAIN, TEST, MAPS, trainer=constant, fill="zero", **options)
    more = MAPS | {"another": MAPS["worst"]}
    assert len(attrbox.roar(linear, TRAIN, TEST, more, trainer=constant, **options).cells) == 3
    (path,) = tmp_path.glob("perfect*")
    record = json.loads(path.read_text())
    assert record["method"] == "perfect"
    assert 0 <= record["accuracy"] <= 1
    path.write_text("{")
    with pytest.raises(FileError, match="Delete it"):
        attrbox.roar(linear, TRAIN, TEST, MAPS, trainer=constant, **options)


def test_table_csv_and_figure(tmp_path):
    accuracies = {("a/b", 0.5): (0.5, 0.7), ("random", 0.5): (0.8, 0.8), (WHOLE, 0.0): (0.9, 1.0)}
    cells = tuple(Cell(m, f, s, a) for (m, f), both in accuracies.items() for s, a in enumerate(both))
    result = Roar(cells, ("a/b", "random"), (0.0, 0.5), ("random",))
    lines = result.table(1).splitlines()
    assert lines[0] == "| method | 0 % | 50 % |"
    assert lines[2] == "| a/b | 95.0 ± 7.1 | 60.0 ± 14.1 |"
    assert lines[3] == "| random (control) | 95.0 ± 7.1 | 80.0 ± 0.0 |"
    rows = list(csv.DictReader(result.to_csv(tmp_path / "roar.csv").read_text().splitlines()))
    assert rows[0] == {"method": "a/b", "fraction": "0.5", "seed": "0", "accuracy": "0.5"}
    figure = result.plot(tmp_path / "roar.png")
    assert (tmp_path / "roar.png").stat().st_size > 5000
    lines = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert lines["a/b"].get_ydata() == pytest.approx([95, 60])
    assert lines["random"].get_ydata() == pytest.approx([95, 80])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fractions": (0.5, 0.5)}, OptionError, "fractions"),
        ({"fractions": (1.5,)}, OptionError, "fractions"),
        ({"seeds": ()}, OptionError, "seeds"),
        ({"fill": "red"}, OptionError, "fill"),
        ({"maps": {}}, InputError, "at least one method"),
        ({"maps": {WHOLE: MAPS["perfect"]}}, OptionError, "taken"),
        ({"maps": {"m": (perfect(600), perfect(600))}}, InputError, "2000 images"),
        ({"maps": {"m": (perfect(600) * float("nan"), perfect(2000))}}, InputError, "NaN"),
        ({"train_set": (TRAIN[0], TRAIN[1][:5])}, InputError, "one class index for each"),
        ({"train_set": (TRAIN[0], TRAIN[1].float())}, InputError, "one class index for each"),
        ({"factory": lambda: 3}, TrainingError, "torch.nn.Module"),
        ({"trainer": lambda *args: 3}, TrainingError, "model or None"),
    ],
)
def test_bad_input(changes, error, message):
    given = {
        "factory": linear, "train_set": TRAIN, "test_set": TEST, "maps": MAPS, "trainer": constant, "fractions": (0.5,),
        "seeds": (0,), "progress": False,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        attrbox.roar(**(given | changes))


def test_training_depends_on_the_seed_alone():
    x, labels = TRAIN[0][:50], TRAIN[1][:50]
    trainer = Trainer(epochs=1, batch_size=7)

    def net() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 2))

    state = torch.get_rng_state()
    first, again, other = (train(net, x, labels, trainer, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[1].weight, again[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)
    assert not first.training
    slower = train(net, x, labels, Trainer(epochs=1, batch_size=7, learning_rate=1e-5), seed=0)
    assert not torch.equal(first[1].weight, slower[1].weight)


def test_steps_of_the_trainer_by_hand():
    """AdamW, its learning rate along one cycle: half a cosine up for three tenths of the steps, another one down."""
    x, labels = TRAIN[0][:50], TRAIN[1][:50]
    trainer = Trainer(epochs=3, batch_size=16, learning_rate=0.02, weight_decay=0.1, label_smoothing=0.2)
    found = train(linear, x, labels, trainer, seed=4)[1]
    with torch.random.fork_rng():
        torch.manual_seed(mixed(4, 1))
        model = linear()
    weights = [parameter.detach().double().requires_grad_() for parameter in model.parameters()]
    moments = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    steps = 3 * 4
    top = 0.3 * (steps + 1) - 1  # the step with the largest rate
    generator = torch.Generator().manual_seed(mixed(4, 0))
    step = 0
    for _ in range(3):
        for rows in torch.split(torch.randperm(50, generator=generator), 16):
            start, end, share = (
                (1 / 25, 1, step / top) if step <= top else (1, 1 / 25 / 1e4, (step - top) / (steps - top))
            )
            rate = 0.02 * (end + (start - end) * (1 + math.cos(math.pi * share)) / 2)
            outputs = (x[rows].double().flatten(1) @ weights[0].T + weights[1]).log_softmax(1)
            right = outputs.gather(1, labels[rows, None])[:, 0]
            loss = -(0.8 * right + 0.2 * outputs.mean(1)).mean()
            step += 1
            for place, (weight, slope) in enumerate(zip(weights, torch.autograd.grad(loss, weights), strict=True)):
                first, second = moments[0][place], moments[1][place]
                first.mul_(0.9).add_(slope, alpha=0.1)
                second.mul_(0.999).addcmul_(slope, slope, value=0.001)
                with torch.no_grad():
                    weight *= 1 - rate * 0.1
                    scale = (second / (1 - 0.999**step)).sqrt() + 1e-8
                    weight -= rate / (1 - 0.9**step) * first / scale
    torch.testing.assert_close(found.weight.double(), weights[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.bias.double(), weights[1], rtol=1e-4, atol=1e-6)


def test_options_of_the_trainer_do_what_they_say():
    x, labels = TRAIN[0][:64], TRAIN[1][:64]
    weights = {
        name: train(linear, x, labels, Trainer(**({"epochs": 2, "batch_size": 16} | options)), seed=0)[1].weight
        for name, options in {
            "plain": {},
            "epochs": {"epochs": 3},
            "batch_size": {"batch_size": 32},
            "weight_decay": {"weight_decay": 5.0},
            "label_smoothing": {"label_smoothing": 0.3},
            "augment": {"augment": lambda batch: -batch},
        }.items()
    }
    assert all(not torch.equal(weights["plain"], other) for name, other in weights.items() if name != "plain")
    for options in (
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0},
        {"weight_decay": -1},
        {"label_smoothing": 1},
    ):
        with pytest.raises(OptionError, match=next(iter(options))):
            Trainer(**options)
    with pytest.raises(ModelError, match="training loss"):
        train(linear, x * 1e30, labels, Trainer(epochs=3, learning_rate=1e30))


def test_permuted_labels_cannot_be_learned_but_by_heart():
    true = train(linear, *TRAIN, QUICK, seed=0)
    permuted = train_on_permuted_labels(linear, *TRAIN, QUICK, seed=0)
    assert accuracy(true, *TEST) > 0.98
    assert accuracy(permuted, *TEST) == pytest.approx(0.5, abs=0.2)
    seen = []
    train_on_permuted_labels(linear, *TRAIN, lambda model, x, labels, seed: seen.append(labels), seed=0)
    assert sorted(seen[0].tolist()) == sorted(TRAIN[1].tolist())
    assert not torch.equal(seen[0], TRAIN[1])


def test_accuracy_leaves_the_model_alone():
    model, x = relu_net(), images(5, 3, 8, 8)
    predictions = model(x).argmax(1)
    with nothing_changes(model, x):
        assert accuracy(model, x, predictions, batch_size=2) == 1
        assert accuracy(model, x, (predictions + torch.tensor([1, 0, 0, 0, 0])) % 4) == pytest.approx(0.8)


@pytest.mark.parametrize(("progress", "disable"), [(True, None), (False, True)])
def test_progress_is_shown_if_asked_for(monkeypatch, progress, disable):
    shown = []

    def bar(cells, **options):
        shown.append(options["disable"])
        return cells

    monkeypatch.setattr("attrbox.metrics.faithfulness.roar.tqdm", bar)
    attrbox.roar(linear, TRAIN, TEST, MAPS, fractions=(0.5,), seeds=(0,), trainer=QUICK, fill="zero", progress=progress)
    assert shown == [disable]

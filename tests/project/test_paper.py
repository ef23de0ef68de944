"""The paper's experiments run end to end at toy sizes on made-up data, and go on where they stopped."""

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import attrbox
from attrbox.data.models.loaded_model import LoadedModel, Preprocess

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def paper(monkeypatch):
    """The command, called with arguments in words."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    command = pytest.importorskip("paper.command")
    yield lambda *words: command.main([str(word) for word in words])
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("paper", "engine", "cifar10", "learned_quality")
    ]:
        del sys.modules[name]


@pytest.fixture
def digits(tmp_path):
    """Digits of two classes that the first columns tell apart."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 60)
    images = generator.integers(0, 60, (60, 28, 28))
    images[:, :, :9] += 150 * labels[:, None, None]
    np.savez(tmp_path / "digits.npz", images=images.astype(np.uint8), labels=labels.astype(np.uint8))
    return tmp_path / "digits.npz"


def pictures(folder: Path, count: int, side: int, names: str) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(count)
    for index in range(count):
        pixels = generator.integers(0, 256, (side, side, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / names.format(index=index, label=index % 3))


@pytest.fixture
def cifar(tmp_path):
    for split, count in (("train", 65), ("test", 6)):
        for kind in ("cat", "dog"):
            pictures(tmp_path / "cifar" / split / kind, count, 32, "{index}.jpg")
    return tmp_path / "cifar"


def tiny() -> LoadedModel:
    """A classifier of photographs for the test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        )
    mean, std = (0.5,) * 3, (0.25,) * 3
    names = ("cat", "dog", "newt")
    return LoadedModel(model.eval(), "tiny", Preprocess(24, 24, mean, std), mean, std, names)


def test_mnist_curves_and_roar_resume(paper, digits, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = (
        *("--out", out, "--mnist", digits, "--mnist-images", 4, "--mnist-epochs", 2, "--only", "fig5", "table1"),
        *("--roar-fractions", 0, 0.5, "--roar-seeds", 2, "--roar-iterations", 2),
    )
    paper(*words)
    report = (out / "report.md").read_text(encoding="utf-8")
    for name in ("learned_clean", "deeplift", "random (control)", "48 training and 12 test images, 2 seed(s)"):
        assert name in report
    with open(out / "table1-mnist_cnn.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # the whole images once per seed, then both methods and both controls
    assert len(rows) == 2 * (1 + 4)
    for name in ("fig5-mnist_cnn.png", "table1-mnist_cnn.png"):
        assert 0 < (out / name).stat().st_size < 300_000

    before = {path: path.stat().st_mtime_ns for path in (out / "kept").rglob("*") if path.is_file()}
    for name in ("explain", "evaluate"):
        monkeypatch.setattr(attrbox, name, lambda *_, **__: pytest.fail("done before"))
    paper(*words)
    assert (out / "report.md").read_text(encoding="utf-8") == report
    assert before == {path: path.stat().st_mtime_ns for path in (out / "kept").rglob("*") if path.is_file()}
    monkeypatch.undo()


def test_another_setting_takes_what_still_fits(paper, digits, tmp_path):
    out = tmp_path / "out"
    words = ("--out", out, "--mnist", digits, "--only", "fig5", "--mnist-epochs", 1)
    paper(*words, "--mnist-images", 2)
    kept = {path.name for path in (out / "kept").iterdir()}
    paper(*words, "--mnist-images", 3)
    more = {path.name for path in (out / "kept").iterdir()}
    assert kept < more
    assert not [name for name in more - kept if name.startswith("weights")]


def test_sweeps_and_ablations_on_cifar(paper, cifar, tmp_path, monkeypatch):
    from paper import sweeps

    variants = {label: own | {"iterations": 2} for label, own in sweeps.ABLATIONS.items()}
    monkeypatch.setattr(sweeps, "ABLATIONS", variants)
    monkeypatch.setattr(sweeps, "PAPER", {"iterations": {1: 0.86, 2: 0.5}, "c+": {0.75: 0.23}})
    out = tmp_path / "out"
    common = ("--out", out, "--cifar", cifar, "--cifar-epochs", 1, "--sweep-images", 2)
    paper(*common, "--only", "fig9", "table2")
    assert "| iterations = 2 | 0.50 |" in (out / "table2.md").read_text(encoding="utf-8")
    table = (out / "fig9.md").read_text(encoding="utf-8")
    for variant in ("as published", "standard convolution", "game preserve", "random"):
        assert f"| {variant} |" in table
    assert (out / "fig9.png").exists()


def test_pictures_of_photographs(paper, tmp_path, monkeypatch):
    from paper import cases, pictures as drawn

    monkeypatch.setattr(cases, "load_model", lambda name: tiny())
    folder, out = tmp_path / "photographs", tmp_path / "out"
    pictures(folder, 6, 30, "{label}_{index}.png")
    monkeypatch.setattr(drawn, "FEW", {"grad_cam": ("grad_cam", {})})
    words = ("--out", out, "--photographs", folder, "--only", "fig7", "fig8")
    paper(*words, "--misclassified", 1, "--composites", 1)
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "![](fig7.png)" in report
    assert "| grad_cam |" in report
    assert (out / "fig8.png").stat().st_size < 300_000


def test_maps_that_were_made_before_are_taken(paper, tmp_path, monkeypatch):
    from paper import cases, pictures as drawn

    monkeypatch.setattr(cases, "load_model", lambda name: tiny())
    few = {"deeplift": ("deeplift", {}), "saliency": ("saliency", {})}
    monkeypatch.setattr(drawn, "LEARNED", few)
    monkeypatch.setattr(drawn, "GRADIENTS", {})
    folder, out, made = tmp_path / "photographs", tmp_path / "out", tmp_path / "made"
    pictures(folder, 3, 30, "{label}_{index}.png")
    made.mkdir()
    torch.save(torch.ones(2, 24, 24), made / "maps-deeplift.pt")
    none = ("--mask-iterations", 0, "--smask-iterations", 0)
    words = ("--out", out, "--photographs", folder, "--maps", made, "--only", "fig6", *none, "--photographs-count")
    paper(*words, 2)
    assert (out / "fig6.png").stat().st_size < 300_000
    assert [path.name.split()[3] for path in (out / "kept").iterdir()] == ["saliency"]
    with pytest.raises(SystemExit, match="2 maps, fewer than"):
        paper(*words, 3)


def test_what_has_no_data_is_left_out_and_said(paper, tmp_path, capsys):
    paper("--out", tmp_path / "out", "--only", "table1", "fig7")
    said = capsys.readouterr().out
    assert "table1 left out: it needs one of --mnist, --cifar" in said
    assert "fig7 left out: it needs one of --photographs" in said
    with pytest.raises(SystemExit):
        paper("--only", "fig4")


def test_names_depend_on_everything(paper, tmp_path):
    from paper.kept import Kept, digest

    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(2, 2)
    assert digest(x, model) == digest(x.clone(), model)
    different = [digest(x), digest(x[:1]), digest(2 * x), digest(x.double()), digest(model), digest(other), digest("x")]
    assert len(set(different)) == len(different)

    kept, calls = Kept(tmp_path), []
    compute = lambda: calls.append(1) or {"a": x}  # noqa: E731
    assert torch.equal(kept("some/thing", (x,), compute)["a"], kept("some/thing", (x,), compute)["a"])
    kept("some/thing", (2 * x,), compute)
    assert len(calls) == 2

    def failing():
        raise ValueError("no")

    with pytest.raises(Exception, match="no"):
        kept("broken", (), failing)
    assert len(list(tmp_path.iterdir())) == 2
    shutil.rmtree(tmp_path)

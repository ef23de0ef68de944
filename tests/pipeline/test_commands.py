"""The commands export, inspect, evaluate, report and configs: what they write, print, and exit with."""

import functools
import json
import os
import sys
from pathlib import Path

import h5py
import pytest
from command_line import TINY, run
from PIL import Image

import attrbox
from attrbox.core.progress import progress_bar
from attrbox.core.random_streams import streams


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue", "white")):
        image = Image.new("RGB", (20, 16), colour)
        image.paste("grey", (2 * index, 3, 9 + index, 12))
        image.save(folder / f"{colour}.png")
    return folder


@pytest.fixture
def exported(pictures: Path, tmp_path: Path) -> Path:
    path = tmp_path / "maps.h5"
    done = run("export", pictures, "--model", TINY, "-m", "saliency,IG:steps=3", "--out", path)
    assert done.exit_code == 0, done.output
    return path


@pytest.mark.parametrize("command", ["export", "inspect", "evaluate", "report", "doctor", "configs", "merge", "split"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"attrbox {command}" in result.output.split("Example")[1]


def test_export_and_again(pictures: Path, exported: Path) -> None:
    with attrbox.open_maps(exported) as maps:
        assert list(maps) == ["saliency", "integrated_gradients"]
        assert maps.classes == ["red", "green", "blue"]
        assert f'name = "{TINY}"' in maps.attributes["config"]
    again = run("export", pictures, "--model", TINY, "-m", "saliency,IG:steps=3,random", "--out", exported, "--json")
    summary = json.loads(again.output)
    assert summary["maps"] == 4
    assert summary["complete"]
    assert summary["done"] == {"saliency": 4, "integrated_gradients": 4, "random": 4}


def test_export_of_a_broken_image_tells_and_exits_with_1(pictures: Path, tmp_path: Path) -> None:
    (pictures / "bro\x1b[31mken.png").write_bytes(b"no picture")
    done = run("export", pictures, "--model", TINY, "-m", "saliency", "--out", tmp_path / "maps.h5")
    assert done.exit_code == 1
    assert "4 of 5 samples" in done.output
    assert "no map of" in done.output
    assert "\x1b" not in done.output


def test_export_by_a_config(pictures: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        f'methods = ["saliency"]\n[model]\nname = "{TINY}"\n[data]\npath = "{pictures}"\nresize = 8\ncrop = 8\n'
        f'[output]\npath = "{tmp_path}/maps.h5"\n[run]\nseed = 3\ntarget = "green"\n'
    )
    refused = run("export", "--config", config)
    assert refused.exit_code == 2
    assert "--trust" in refused.stderr
    done = run("export", "--config", config, "--trust", "--set", "run.seed=4", "--dtype", "float16")
    assert done.exit_code == 0, done.output
    with attrbox.open_maps(tmp_path / "maps.h5") as maps:
        assert maps["saliency"].shape == (4, 3, 8, 8)
        assert str(maps["saliency"].dtype) == "float16"
        assert maps.settings["seed"] == 4
        assert maps.seeds == list(streams(4, 4))
        assert maps.column("target").tolist() == [1] * 4
        printed = run("inspect", tmp_path / "maps.h5", "--config").output
        assert "seed = 4" in printed
        assert printed.strip() == maps.attributes["config"].strip()


def test_inspect(exported: Path) -> None:
    done = run("inspect", exported, "--verify")
    assert done.exit_code == 0
    for text in ("4 samples", "integrated_gradients: 4 of 4 done", "steps=3", "model: tiny", "verified"):
        assert text in done.output
    record = json.loads(run("inspect", exported, "--json").output)
    assert record["methods"]["integrated_gradients"]["options"]["steps"] == 3
    assert record["settings"]["samples"] == 4
    assert "damage" not in record
    content = bytearray(exported.read_bytes())
    with attrbox.open_maps(exported) as maps:
        place = maps["saliency"].dataset.id.get_chunk_info(0).byte_offset
    content[place + 1200 : place + 1204] = b"\x01\x02\x03\x04"
    exported.write_bytes(content)
    damaged = run("inspect", exported, "--verify")
    assert damaged.exit_code == 1
    assert "DAMAGED: saliency, sample 'blue'" in damaged.output


def test_evaluate_and_report(pictures: Path, exported: Path, tmp_path: Path) -> None:
    refused = run("evaluate", exported)
    assert refused.exit_code == 2
    assert "--trust" in refused.stderr
    done = run("evaluate", exported, "--trust", "--metrics", "morf,sparseness", "--csv", tmp_path / "scores.csv")
    assert done.exit_code == 0, done.output
    assert "sparseness" in done.output
    assert "4 samples measured" in done.output
    assert (tmp_path / "scores.csv").read_text().count("\n") == 9
    some = run("evaluate", exported, "--trust", "--metrics", "complexity", "--n-samples", "2", "--json")
    record = json.loads(some.output)
    assert record["samples"] == 2
    assert {row["metric"] for row in record["scores"]} == {"complexity"}
    assert json.loads(run("inspect", exported, "--json").output)["scores"] == ["complexity", "morf", "sparseness"]
    with h5py.File(exported, "r+") as file:  # an older version's words, of which nobody is told
        file.attrs["config"] = file.attrs["config"].replace("thumbnails", "photographs")
        assert "photographs = true" in file.attrs["config"]
    assert run("evaluate", exported, "--trust", "--metrics", "complexity").exit_code == 0
    told = run("report", exported)
    assert told.exit_code == 0
    assert "morf" in exported.with_suffix(".html").read_text()
    Image.new("RGB", (20, 16), "black").save(pictures / "red.png")
    changed = run("evaluate", exported, "--trust", "--metrics", "morf")
    assert changed.exit_code == 2
    assert "'red'" in changed.stderr


def test_scores_do_not_depend_on_how_many_are_read_at_once(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (64, 3):
        monkeypatch.setattr("attrbox.pipeline.evaluate_file._AT_ONCE", size)
        found.append(json.loads(run("evaluate", exported, "--trust", "--metrics", "morf", "--json").output)["scores"])
    assert [row["mean"] for row in found[0]] == pytest.approx([row["mean"] for row in found[1]], rel=1e-5)


def test_split_and_merge(exported: Path, tmp_path: Path) -> None:
    told = run("split", exported, "2")
    assert told.exit_code == 0, told.output
    parts = [tmp_path / f"maps-{part}-of-2.h5" for part in (1, 2)]
    assert [line.split()[1] for line in told.output.splitlines()] == [f"{part}." for part in parts]
    assert run("merge", *parts, "--out", tmp_path / "again.h5").exit_code == 0
    assert run("merge", *reversed(parts), "--out", tmp_path / "virtual.h5", "--virtual").exit_code == 0
    with attrbox.open_maps(exported) as whole, attrbox.open_maps(tmp_path / "again.h5") as again:
        assert again.ids == whole.ids
        assert (again["saliency"].numpy() == whole["saliency"].numpy()).all()
    for command in (["split", exported, "2"], ["merge", *parts, "--out", exported]):
        refused = run(*command)
        assert refused.exit_code == 2
        assert "exists already" in refused.stderr
    assert run("split", exported, "9").exit_code == 2
    twice = run("merge", parts[0], tmp_path / "virtual.h5", "--out", tmp_path / "twice.h5")
    assert twice.exit_code == 2
    assert "more than one" in twice.stderr
    assert not (tmp_path / "twice.h5").exists()


def test_doctor_for_programs() -> None:
    record = json.loads(run("doctor", TINY, "--json").output)
    assert record["model"] == "tiny"
    assert record["operations"]["relu"] == 1
    assert {"method": "saliency", "verdict": "exact", "reason": "as defined"} in record["findings"]
    assert run("doctor", "torchvision:nope").exit_code == 2


def test_another_model_is_named(pictures: Path, exported: Path) -> None:
    model = ("--model", "torchvision:squeezenet1_1", "--weights", "none")
    other = run("export", pictures, *model, "-m", "saliency", "--out", exported)
    assert other.exit_code == 2
    assert "model tiny there and squeezenet1_1 here" in other.stderr
    assert "--overwrite" in other.stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 100_000, 40))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress_bar("export", 100, 20) as bar:
        for _ in range(4):
            bar.update(10)
    told = capsys.readouterr().err
    if terminal:
        assert "export:" in told
        assert "%|" in told
    else:
        lines = told.replace("\r", "").split("\n")
        assert any("of 100 images [" in line and "left" in line for line in lines)
        assert "%|" not in told
    with progress_bar("export", 100, shown=False) as bar:
        bar.update(100)
    assert capsys.readouterr().err == ""


def test_configs(tmp_path: Path) -> None:
    assert "seed = 0" in run("configs").output
    keys = json.loads(run("configs", "--json").output)
    assert {"table": "run", "key": "seed", "default": 0} in [
        {k: v for k, v in key.items() if k != "help"} for key in keys
    ]
    (tmp_path / "x.toml").write_text("[run]\nsede = 1\n")
    wrong = run("configs", tmp_path / "x.toml")
    assert wrong.exit_code == 2
    assert "line 2" in wrong.stderr
    assert "seed = 5" in run("configs", "--set", "run.seed=5").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export"], "give images"),
        (["export", "missing"], "there is no 'missing'"),
        (["export", "{empty}", "--model", TINY], "Expected images in the folder"),
        (["export", "{text}", "--model", TINY], "None of the 1 samples"),
        (["export", "{pictures}", "--model", TINY, "--dtype", "int8"], "dtype"),
        (["export", "{pictures}", "--model", TINY, "--target", "rad"], "Did you mean 'red'"),
        (["export", "{pictures}", "--model", TINY, "--target", "7"], "from 0 to 2"),
        (["export", "{pictures}", "--model", TINY, "--device", "abacus"], "abacus"),
        (["export", "{pictures}", "--model", TINY, "--out", "{text}"], "broken"),
        (["export", "{pictures}", "--model", TINY, "--config", "none.toml"], "Cannot read the config"),
        (["export", "{pictures}", "--model", TINY, "--out", "{text}/maps.h5"], "Cannot write beside"),
        (["export", "{pictures}", "--model", TINY, "--out", "/proc/maps.h5"], "Cannot write beside '/proc/maps.h5'"),
        (["inspect", "none.h5"], "there is no 'none.h5'"),
        (["inspect", "{text}"], "no HDF5 file"),
        (["evaluate", "none.h5"], "there is no 'none.h5'"),
        (["report", "{text}"], "no HDF5 file"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    arguments: list[str], message: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    places = {"{empty}": "empty", "{pictures}": "pictures", "{text}": "text.txt"}
    before = sorted(os.listdir(tmp_path))
    result = run(*(functools.reduce(lambda text, place: text.replace(*place), places.items(), a) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(tmp_path)) in (before, sorted([*before, "out"]))
    assert (tmp_path / "text.txt").read_text() == "text"
    assert not list(tmp_path.glob("out/*"))

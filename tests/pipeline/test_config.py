"""Configs say what is wrong and where, run no code of their own, and come back from the text they are kept as."""

from pathlib import Path

import pytest
from command_line import TINY

from attrbox.errors import FileError, OptionError
from attrbox.pipeline.config import Config, described, load, parse

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))

TEXT = f"""
methods = ["saliency", {{name = "IG", steps = 4}}]

[model]
name = "{TINY}"   # a comment

[run]
seed = 3
target = "label"
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_ready_configs_are_valid(path):
    config = load(path)
    assert parse(config.to_toml(), "again") == config


def test_there_are_ready_configs():
    assert {path.stem for path in CONFIGS} >= {"demo", "imagenet", "cifar10", "paper"}


def test_a_config_is_read_changed_and_kept():
    config = parse(
        TEXT,
        "x.toml",
        ["run.seed=7", "output.path=other.h5", 'data.path=["a", "b"]'],
        {"run.device": "cuda", "run.workers": None},
        trust=True,
    )
    assert config.run.seed == 7
    assert config.run.device == "cuda"
    assert config.output.path == "other.h5"
    assert config.data.path == ["a", "b"]
    assert config.chosen_methods == [("saliency", {}), ("IG", {"steps": 4})]
    assert parse(config.to_toml(), "again", trust=True) == config


@pytest.mark.parametrize("text", ['"quoted"', "back\\slash", "ü\u4e2d", "tab\t", "\x7f", "a\nb", "]", "#"])
def test_odd_texts_are_kept(text):
    config = parse("", "x", given={"data.path": text})
    assert parse(config.to_toml(), "again").data.path == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nsede = 3", r"x.toml, line 2: there is no 'run.sede'. Did you mean 'seed'"),
        ("[runn]\nseed = 3", r"x.toml, line 1: there is no 'runn'. Did you mean 'run'"),
        ("\n[run]\n\nseed = 'three'", r"x.toml, line 4: expected run.seed to be a valid integer, got 'three'"),
        ("[run]\nseed = true", r"line 2: expected run.seed to be a valid integer"),
        ("[output]\ndtype = 'int8'", r"line 2: expected output.dtype to be 'float32', 'float16' or 'float64'"),
        ("[data]\npath = []", r"line 2: expected data.path to be a valid string or List should have at least 1 item"),
        ("[data]\nmean = [0.5, 'x']", r"line 2: expected data.mean to be a valid number, got 'x'"),
        ("model = 'resnet'", r"line 1: expected a table \[model\]"),
        ("methods = ['salency']", r"line 1: .*Did you mean 'saliency'"),
        ("methods = [\n {name = 'IG', stops = 3}]", r"line 1: .*no option 'stops'"),
        ("methods = [{steps = 3}]", r"line 1: Expected a name, or a table with one"),
        ("metrics = ['morff']", r"line 1: .*Did you mean 'morf'"),
        ("a = ", r"x.toml is not TOML: Invalid value"),
        ("[model]\nname = 'os:getcwd'", r"line 2 names the factory 'os:getcwd', whose code would run.*--trust"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text, message):
    with pytest.raises(OptionError, match=message):
        parse(text, "x.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed", "KEY=VALUE"),
        ("run.sede=3", "--set run.sede=3: there is no"),
        ("run.seed=x", "valid integer, got 'x'"),
        ("methods.x=3", "no table"),
    ],
)
def test_wrong_changes(change, message):
    with pytest.raises(OptionError, match=message):
        parse('methods = ["saliency"]', "x.toml", [change])


def test_a_factory_runs_only_when_the_user_names_it():
    with pytest.raises(OptionError, match="--trust"):
        parse(TEXT, "x.toml")
    assert parse(TEXT, "x.toml", trust=True).model.name == TINY
    assert parse("", "x.toml", given={"model.name": TINY}).model.name == TINY


def test_missing_files(tmp_path):
    with pytest.raises(FileError, match="Cannot read the config"):
        load(tmp_path / "none.toml")


def test_every_key_is_described():
    keys = {(table, key) for table, key, _, _ in described()}
    assert ("run", "seed") in keys
    assert ("", "methods") in keys
    assert all(help for *_, help in described())
    assert Config().run.target == "argmax"

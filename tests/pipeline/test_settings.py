"""`export` takes its settings in three groups; old keywords of their own work for one release."""

import dataclasses
import inspect
import warnings

import pytest
import torch
from command_line import run
from exports import assert_same, grouped, net, pictures

import attrbox
from attrbox.errors import AttrboxError, InputError, OptionError, RenamedWarning
from attrbox.pipeline.config import parse
from attrbox.pipeline.settings import FORMERLY, GROUPS
from attrbox.pipeline.shards import Shard

# A value other than the default for each field, under its name of today.
VALUES = {
    "preprocess": lambda image: 2 * image, "ids": list("abcd"), "labels": dict.fromkeys("0123", "1"), "workers": 0,
    "dtype": "float16", "compression": "lzf", "channels": "one", "thumbnails": False, "model_name": "mine",
    "config": "[run]", "batch_size": 3, "precision": torch.bfloat16, "channels_last": False, "resume": False,
    "retry": True, "keep_both": True, "overwrite": True, "shard": Shard(0, 1),
}  # fmt: skip
FIELDS = [(group, field.name) for group, cls in GROUPS.items() for field in dataclasses.fields(cls)]
X = pictures(4)


def export(path, **arguments):
    return attrbox.export(net(), X, path, ["saliency", "random"], progress=False, **arguments)


def test_export_takes_what_everyone_says_and_three_groups():
    parameters = inspect.signature(attrbox.export).parameters
    assert list(parameters) == ["model", "data", "path", "methods", "target", "seed", *GROUPS, "progress"]
    assert len(GROUPS) == 3
    assert VALUES.keys() == {field for _, field in FIELDS}
    assert all(getattr(attrbox, cls.__name__) is cls for cls in GROUPS.values())


@pytest.mark.parametrize(("group", "field"), FIELDS)
def test_an_old_keyword_means_the_field(group, field, tmp_path):
    old = {new: name for name, new in FORMERLY.items()}.get(field, field)
    new = export(tmp_path / "new.h5", **grouped(**{field: VALUES[field]}))
    with pytest.warns(RenamedWarning) as caught:
        found = export(tmp_path / "old.h5", **{old: VALUES[field]})
    assert len(caught) == 1
    assert f"{group}=attrbox.{GROUPS[group].__name__}({field}=...)" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert (found.images, found.maps) == (new.images, new.maps) == (4, 8)
    assert_same(found.path, new.path)
    with pytest.raises(InputError, match=f"{field} beside {group}"):
        export(tmp_path / "both.h5", **{old: VALUES[field], group: GROUPS[group]()})


def test_several_old_keywords_of_two_groups(tmp_path):
    with pytest.warns(RenamedWarning) as caught:
        export(tmp_path / "maps.h5", dtype="float16", photographs=False, batch_size=2)
    assert sorted(str(one.message).split(" now.")[0] for one in caught) == [
        "attrbox.export takes batch_size as running=attrbox.Running(batch_size=...)",
        "attrbox.export takes dtype, thumbnails as storage=attrbox.Storage(dtype=..., thumbnails=...)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtpye": "float16"}, r"no argument 'dtpye'\. Did you mean storage=attrbox\.Storage\(dtype=\.\.\.\)\?"),
        ({"thumbnails": False}, r"Did you mean storage=attrbox\.Storage\(thumbnails=\.\.\.\)\?"),
        ({"sed": 3}, r"no argument 'sed'\. Did you mean seed\?"),
        ({"storage": {"dtype": "float16"}}, r"Expected storage to be an attrbox\.Storage, got {'dtype': 'float16'}"),
        ({"running": attrbox.Storage()}, r"Expected running to be an attrbox\.Running"),
        ({"loading": None}, r"Expected loading to be an attrbox\.Loading, got None"),
    ],
)
def test_what_export_does_not_take(arguments, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        export(tmp_path / "maps.h5", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("loading", "workers", -1), ("storage", "dtype", "int8"), ("storage", "compression", "zip"),
        ("storage", "channels", "two"), ("running", "batch_size", 0), ("running", "batch_size", 2.5),
    ],
)  # fmt: skip
def test_groups_check_their_fields(group, field, value):
    with pytest.raises(AttrboxError, match=field):
        GROUPS[group](**{field: value})


def test_configs_and_commands_take_old_names(tmp_path):
    with pytest.warns(RenamedWarning, match="'photographs' of the config is called 'thumbnails'"):
        config = parse("[output]\nphotographs = false", "a.toml")
    assert config.output.thumbnails is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse(config.to_toml(), "again") == config
    with pytest.raises(OptionError, match="'photographs' and 'thumbnails'"):
        parse("[output]\nphotographs = false\nthumbnails = true", "a.toml")
    assert "--beside is called --keep-both now" in run("export", "--beside", tmp_path).stderr

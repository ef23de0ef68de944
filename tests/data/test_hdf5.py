"""HDF5 files, schema 1: what is written is what was there, wholly or not at all."""

import hashlib
import json
import os
import sys
from datetime import UTC, datetime, timedelta

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from attrbox.core.hashing import weights_hash
from attrbox.core.results import Attribution, Coverage, Operated
from attrbox.data.maps import schema
from attrbox.data.maps.schema import (
    create_datasets,
    dataset_name,
    sample_columns,
    write_header,
    write_maps,
    write_samples,
)
from attrbox.errors import FileError, InputError, ModelError, OptionError


def maps(values, targets=None, **changes):
    """Maps with these values, for `targets` targets each if that is a number."""
    score = torch.arange(float(np.prod(values.shape[: 1 if targets is None else 2])))
    score = score.reshape(values.shape[: 1 if targets is None else 2])
    parts = {"target": score.long() + 5, "options": {}, "coverage": Coverage(), **changes}
    return Attribution("made_up", values, parts.pop("target"), score, **parts)


@pytest.fixture
def values():
    return torch.randn(4, 3, 10, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "maps.h5"


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("compression", ["gzip", "lzf", None])
def test_maps_come_back_as_they_were_in_order(path, values, compression):
    labels = [f"method_{index}" for index in (3, 1, 2, 10, 9, 8, 7, 6, 5, 4)]
    attributions = {label: maps(values + index) for index, label in enumerate(labels)}
    attributions["coarse"] = maps(values[:, :1])
    assert write_maps(path, attributions, compression=compression) == path
    with h5py.File(path) as file:
        assert list(file["maps"]) == [*labels, "coarse"]
        for label, attribution in attributions.items():
            dataset = file["maps"][label]
            assert dataset.dtype == np.float32
            assert dataset.compression == compression
            assert dataset.chunks == (1, *attribution.values.shape[1:])
            np.testing.assert_array_equal(dataset[:], attribution.values)
            assert file["samples/done"][label][:].tolist() == [True] * 4


def test_samples_come_back(path, values):
    write_maps(
        path,
        {"one": maps(values)},
        predictions=torch.tensor([7, 6, 5, 4]),
        labels=[1, 2, 3, -1],
        ids=["a", "ü\u4e2d", 'quo"te', ""],
        sources=["x/1.png", "x/2.png", "x y.png", "'"],
        seed=[3, 4, 5, 2**62],
    )
    with h5py.File(path) as file:
        samples = file["samples"]
        assert samples["id"].asstr()[:].tolist() == ["a", "ü\u4e2d", 'quo"te', ""]
        assert samples["source"].asstr()[:].tolist() == ["x/1.png", "x/2.png", "x y.png", "'"]
        assert samples["label"][:].tolist() == [1, 2, 3, -1]
        assert samples["prediction"][:].tolist() == [7, 6, 5, 4]
        assert samples["target"][:].tolist() == [5, 6, 7, 8]
        assert samples["score"][:].tolist() == [0, 1, 2, 3]
        assert samples["seed"][:].tolist() == [3, 4, 5, 2**62]
        assert "seed" not in file["maps/one"].attrs


def test_what_is_not_known_is_not_there(path, values):
    write_maps(path, {"one": maps(values, target=None)})
    with h5py.File(path) as file:
        assert sorted(file["samples"]) == ["checksum", "done", "id", "score", "seed"]
        assert file["samples/id"].asstr()[:].tolist() == ["0", "1", "2", "3"]
        assert not {"model", "weights_sha256", "config"} & set(file.attrs)


def test_root_attributes(path, values):
    write_maps(path, {"one": maps(values)}, model_name="ResNet", weights_sha256="ab" * 32, config="x = 'ü'\n" * 20_000)
    with h5py.File(path) as file:
        attributes = dict(file.attrs)
    assert attributes["schema"] == 1
    assert (attributes["model"], attributes["weights_sha256"]) == ("ResNet", "ab" * 32)
    assert attributes["config"] == "x = 'ü'\n" * 20_000  # beyond the 64 kB of an object header
    assert attributes["torch"] == torch.__version__
    assert attributes["h5py"] == h5py.__version__
    assert attributes["python"] == sys.version.split()[0]
    assert attributes["attrbox"]
    age = datetime.now(UTC) - datetime.fromisoformat(attributes["created"])
    assert timedelta(0) <= age + timedelta(seconds=1) < timedelta(minutes=5)


def function_of_a_module(): ...


def test_attributes_of_a_method(path, values):
    baseline = torch.arange(6.0).reshape(2, 3)
    options = {
        "steps": 100,
        "noise": 0.5,
        "limit": float("inf"),
        "layer": None,
        "baseline": baseline,
        "same": baseline.numpy(),
        "pair": (1, True, "ü"),
        "nested": {"rule": function_of_a_module},
        "dtype": torch.float16,
    }
    attribution = maps(
        values,
        options=options,
        units="score per pixel",
        reduction="max",
        coverage=Coverage(rule=(Operated("relu", "a", 0),), unknown=(Operated("erf", "b", 1),)),
    )
    write_maps(path, {"one": attribution}, descriptions={"one": {"summary": "Sums", "reference": "Doe 2020"}})
    with h5py.File(path) as file:
        attributes = dict(file["maps/one"].attrs)
    stored = json.loads(attributes.pop("options"), parse_constant=pytest.fail)
    tensor = {"shape": [2, 3], "dtype": "float32", "sha256": hashlib.sha256(baseline.numpy().tobytes()).hexdigest()}
    assert stored == {
        "steps": 100,
        "noise": 0.5,
        "limit": "inf",
        "layer": None,
        "baseline": tensor,
        "same": tensor,
        "pair": [1, True, "ü"],
        "nested": {"rule": f"{__name__}.function_of_a_module"},
        "dtype": "torch.float16",
    }
    assert attributes == {
        "label": "one",
        "method": "made_up",
        "units": "score per pixel",
        "reduction": "max",
        "coverage": "rule: 1 relu; UNKNOWN: 1 erf",
        "precision": "",
        "channels_last": "True",
        "summary": "Sums",
        "reference": "Doe 2020",
    }


def test_relative_gaps(path, values):
    gap = torch.tensor([0.1, float("nan"), float("inf"), 0])
    write_maps(path, {"one": maps(values, relative_gap=gap), "two": maps(values)})
    with h5py.File(path) as file:
        assert list(file["samples/relative_gap"]) == ["one"]
        np.testing.assert_array_equal(file["samples/relative_gap/one"][:], gap.double())


def test_several_targets(path):
    values = torch.randn(2, 3, 1, 4, 5)
    write_maps(path, {"one": maps(values, targets=3, relative_gap=torch.rand(2, 3))})
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["maps/one"][:], values)
        assert file["maps/one"].chunks == (1, 1, 1, 4, 5)
        assert file["samples/target"][:].tolist() == [[5, 6, 7], [8, 9, 10]]
        assert file["samples/score"].shape == file["samples/relative_gap/one"].shape == (2, 3)
        assert file["samples/done/one"].shape == (2,)


@pytest.mark.parametrize("shape", [(3, 7), (3, 2, 9), (3, 1, 4, 5, 6)])
def test_other_shapes(path, shape):
    values = torch.randn(shape)
    write_maps(path, {"one": maps(values)})
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["maps/one"][:], values)


def test_tensors_of_every_kind(path, values):
    kinds = {
        "bfloat16": values.bfloat16(),
        "double": values.double(),
        "strided": values.transpose(2, 3),
        "graph": values.clone().requires_grad_() * 1,
    }
    write_maps(path, {label: maps(kind) for label, kind in kinds.items()})
    with h5py.File(path) as file:
        for label, kind in kinds.items():
            np.testing.assert_array_equal(file["maps"][label][:], kind.detach().float())
    write_maps(path, {"one": maps(values.double() / 3)}, dtype="float64", overwrite=True)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["maps/one"][:], values.double() / 3)


def test_other_libraries_can_read_the_file_while_it_is_compressed_by_default(path):
    write_maps(path, {"one": maps(torch.zeros(4, 3, 64, 64))})
    assert path.stat().st_size < 4 * 3 * 64 * 64  # 4 bytes each without compression


# ------------------------------------------------------------------------------------------------------- half precision


def test_half_precision_rounds(path, values):
    write_maps(path, {"one": maps(values)}, dtype="float16")
    with h5py.File(path) as file:
        stored = file["maps/one"][:]
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, values.half())
    assert np.abs(stored - values.numpy()).max() <= values.abs().max() * 2**-11


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_half_precision_refuses_what_it_would_lose(path, values, scale, sign):
    values[1] = sign * scale * values[1].abs()  # one sample is enough
    with pytest.raises(InputError, match=r"'one' do not fit float16.*float32"):
        write_maps(path, {"one": maps(values)}, dtype="float16")
    assert not path.exists()


def test_half_precision_takes_zero_and_non_finite_maps(path, values):
    values[0], values[1, 0, 0, 0], values[2, 0, 0, 0] = 0, float("nan"), float("-inf")
    write_maps(path, {"one": maps(values)}, dtype="float16")
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["maps/one"][:], values.half())


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("integrated_gradients(steps=100)", "integrated_gradients(steps=100)"),
        ("grad_cam(layer=a/b)", "grad_cam(layer=a%2Fb)"),
        ("50%", "50%25"),
        ("a%2Fb", "a%252Fb"),
        (".", "%2E"),
        ("..", ".."),
        ("/", "%2F"),
        ("./x", ".%2Fx"),
        ("ü 'quoted' \"twice\"\n", "ü 'quoted' \"twice\"\n"),
        ("nul\0", "nul\\x00"),
        ("lone \udcff", "lone \\udcff"),
    ],
)
def test_labels_make_no_groups(path, values, label, name):
    write_maps(path, {label: maps(values, relative_gap=torch.zeros(4))})
    assert dataset_name(label) == name
    with h5py.File(path) as file:
        assert list(file["maps"]) == list(file["samples/done"]) == list(file["samples/relative_gap"]) == [name]
        np.testing.assert_array_equal(file["maps"][name][:], values)
        assert file["maps"][name].attrs["label"] == label.replace("\0", "\\x00").replace("\udcff", "\\udcff")


def test_an_empty_label_is_refused(path, values):
    with pytest.raises(InputError, match="empty"):
        write_maps(path, {"": maps(values)})


def test_texts_that_hdf5_cannot_hold_are_escaped(path, values):
    odd = "nul\0 lone \udcff"
    escaped = "nul\\x00 lone \\udcff"
    write_maps(
        path,
        {"one": maps(values, options={odd: odd})},
        ids=[odd, "1", "2", "3"],
        labels=["cat", odd, "", "'"],
        model_name=odd,
        config=odd,
        descriptions={"one": {"summary": odd}},
    )
    with h5py.File(path) as file:
        assert file.attrs["config"] == file.attrs["model"] == escaped
        assert file["samples/id"].asstr()[0] == file["samples/label"].asstr()[1] == escaped
        assert file["maps/one"].attrs["summary"] == escaped
        assert json.loads(file["maps/one"].attrs["options"]) == {odd: odd}  # JSON has escapes of its own


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused(path, values):
    one = maps(values)
    with pytest.raises(InputError, match="at least one method"):
        write_maps(path, {})
    with pytest.raises(InputError, match="same samples"):
        write_maps(path, {"one": one, "two": maps(values[:2])})
    with pytest.raises(InputError, match="different targets"):
        write_maps(path, {"one": one, "two": maps(values, target=torch.zeros(4).long())})
    with pytest.raises(InputError, match="different targets"):
        write_maps(path, {"one": one, "two": maps(values, target=None)})
    with pytest.raises(InputError, match="meta device"):
        write_maps(path, {"one": maps(values.to("meta"))})
    with pytest.raises(InputError, match="one label for each of the 4 samples"):
        write_maps(path, {"one": one}, labels=[1, 2, 3])
    with pytest.raises(InputError, match="one id"):
        write_maps(path, {"one": one}, ids=["a"])
    with pytest.raises(InputError, match="label to be a number or a text"):
        write_maps(path, {"one": one}, labels=[None] * 4)
    with pytest.raises(OptionError, match=r"dtype.*'int8'"):
        write_maps(path, {"one": one}, dtype="int8")
    with pytest.raises(OptionError, match=r"compression.*'zip'"):
        write_maps(path, {"one": one}, compression="zip")
    for seed in ([0, 0, 0, 2**64], [-1, 0, 0, 2**64 - 1]):
        with pytest.raises(OptionError, match="64 bits"):
            write_maps(path, {"one": one}, seed=seed)
    assert os.listdir(path.parent) == []


def test_an_existing_file_stays_unless_told(path, values):
    write_maps(path, {"old": maps(values)})
    before = path.read_bytes()
    with pytest.raises(FileError, match=r"maps\.h5.*exists already.*overwrite=True"):
        write_maps(path, {"new": maps(values)})
    assert path.read_bytes() == before
    write_maps(path, {"new": maps(values)}, overwrite=True)
    with h5py.File(path) as file:
        assert list(file["maps"]) == ["new"]
    assert os.listdir(path.parent) == ["maps.h5"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("Can't close"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_write_that_fails_leaves_everything_as_it_was(path, values, monkeypatch, error, exists):
    if exists:
        write_maps(path, {"old": maps(values)})
        before = path.read_bytes()

    def fail(label, attribution, dtype):
        if label == "two":
            raise error
        return attribution.values.numpy()

    monkeypatch.setattr(schema, "_as_dtype", fail)
    wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else FileError
    with pytest.raises(wanted) as caught:
        write_maps(path, {"one": maps(values), "two": maps(values)}, overwrite=True)
    if wanted is FileError:
        assert "maps.h5" in str(caught.value)
        assert caught.value.__cause__ is error
    assert os.listdir(path.parent) == (["maps.h5"] if exists else [])
    if exists:
        assert path.read_bytes() == before


def test_paths_that_cannot_be_written(tmp_path, values):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    for name in ("file/maps.h5", "folder", "nul\0.h5", "n" * 300 + "/maps.h5"):
        with pytest.raises(FileError):
            write_maps(tmp_path / name, {"one": maps(values)}, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "not a folder"


def test_missing_folders_are_made_and_strings_are_paths(tmp_path, values):
    assert write_maps(str(tmp_path / "new" / "folder" / "ü.h5"), {"one": maps(values)}).is_file()


# ------------------------------------------------------------------------------------------------------- batch by batch


def test_batches_make_the_same_file_and_are_marked_as_they_come(path, values):
    whole = {"one": maps(values, relative_gap=torch.rand(4)), "two": maps(values.flip(0))}
    ids = ["a", "b", "c", "d"]

    def batch(rows):
        parts = {}
        for label, attribution in whole.items():
            gap = None if attribution.relative_gap is None else attribution.relative_gap[rows]
            parts[label] = Attribution(
                "made_up",
                attribution.values[rows],
                attribution.target[rows],
                attribution.score[rows],
                {},
                Coverage(),
                relative_gap=gap,
            )
        return parts, sample_columns(parts, ids=ids[rows])

    with h5py.File(path, "w") as file:
        write_header(file)
        create_datasets(file, 4, *batch(slice(0, 3)))
        assert not file["samples/done/one"][:].any()
        write_samples(file, [3], *batch(slice(3, 4)))
        assert file["samples/done/one"][:].tolist() == [False, False, False, True]
        write_samples(file, range(3), *batch(slice(0, 3)))
    write_maps(path.with_name("whole.h5"), whole, ids=ids)
    with h5py.File(path) as file, h5py.File(path.with_name("whole.h5")) as other:
        for name in ("maps/one", "maps/two", "samples/id", "samples/target", "samples/score", "samples/done/two"):
            assert (file[name][:] == other[name][:]).all()
        assert (file["samples/relative_gap/one"][:] == other["samples/relative_gap/one"][:]).all()


# -------------------------------------------------------------------------------------------------------- weights' hash


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).to(dtype)


def test_the_hash_knows_weights_names_types_and_shapes():
    known = {weights_hash(net())}
    for change in (
        lambda model: model[1].running_mean[0].add_(1e-7),
        lambda model: model[1].num_batches_tracked.add_(1),  # 0-dimensional
        lambda model: model.double(),
        lambda model: model.bfloat16(),
        lambda model: model.half(),
        lambda model: model.append(nn.Linear(1, 1)),
        lambda model: setattr(model[2], "bias", None),
        lambda model: setattr(model[2], "weight", nn.Parameter(model[2].weight.detach().reshape(4, 2))),
        lambda model: model.register_buffer("empty", torch.empty(0)),
    ):
        model = net()
        change(model)
        digest = weights_hash(model)
        assert len(digest) == 64
        assert digest not in known
        known.add(digest)


def test_the_hash_knows_neither_memory_format_nor_order_nor_flags():
    model = net()
    digest = weights_hash(model)
    assert weights_hash(net().to(memory_format=torch.channels_last).requires_grad_(False).eval()) == digest
    assert weights_hash(model) == digest
    other = nn.Module()
    for name, child in reversed(list(net().named_children())):
        other.add_module(name, child)
    assert list(other.state_dict()) != list(model.state_dict())
    assert weights_hash(other) == digest


def test_the_hash_is_what_it_says():
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, 0.5)
    nn.init.constant_(model.bias, -2)
    bias, weight = np.array([-2], "<f4").tobytes(), np.array([[0.5, 0.5]], "<f4").tobytes()
    content = b"bias\0torch.float32\0(1,)\0" + bias + b"weight\0torch.float32\0(1, 2)\0" + weight
    assert weights_hash(model) == hashlib.sha256(content).hexdigest()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_hash_does_not_know_the_device():
    assert weights_hash(net().cuda()) == weights_hash(net())


def test_the_hash_takes_odd_tensors_and_refuses_absent_ones():
    model = net()
    other = net()
    for name, lazy, plain in (
        ("conjugate", torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        ("negative", torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0])),
        ("sparse", torch.eye(3).to_sparse(), torch.eye(3)),
        ("flags", torch.tensor([True, False]), torch.tensor([True, False])),
    ):
        model.register_buffer(name, lazy)
        other.register_buffer(name, plain)
        assert weights_hash(model) == weights_hash(other)
    with pytest.raises(ModelError, match=r"0\.bias.*has none"):
        weights_hash(net().to("meta"))
    with pytest.raises(ModelError, match="initialise"):
        weights_hash(nn.LazyLinear(3))

"""Files of maps are read lazily, verified, merged, split, and their maps made again."""

import pickle

import h5py
import numpy as np
import pytest
import torch
from exports import METHODS, Pairs, assert_same, export, net, pictures
from torch.utils.data import DataLoader, StackDataset

import attrbox
from attrbox.data.maps.journal import Journal, journal_of
from attrbox.errors import FileError, InputError, OptionError, UnknownNameError

NAMES = ['"quoted"', "ü\u4e2d", "<script>", "../../etc/passwd", "nul\0", "6", "a b", "%2F", ".", "last"]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "maps.h5"
    export(path, Pairs(pictures(), broken=[5]), ids=NAMES)
    return path


@pytest.fixture
def expected():
    return attrbox.compare(net(), pictures()[:4], METHODS, batch_size=4)


def test_maps_by_place_name_slice_and_list(path, expected):
    with attrbox.open_maps(path) as maps:
        assert list(maps) == ["saliency", "deeplift", "integrated_gradients", "random"]
        assert maps.samples == 10
        one = maps["deeplift"]
        assert isinstance(one[3], torch.Tensor)
        for got, wanted in [
            (one[3], expected["deeplift"].values[3]),
            (one[-7], expected["deeplift"].values[3]),
            (one["ü\u4e2d"], expected["deeplift"].values[1]),
            (one["nul\\x00"], one[4]),
            (one[:3], expected["deeplift"].values[:3]),
            (one[3:0:-2], expected["deeplift"].values[[3, 1]]),
            (one[[2, 0, 2]], expected["deeplift"].values[[2, 0, 2]]),
            (one[["<script>", "../../etc/passwd"]], expected["deeplift"].values[[2, 3]]),
            (one[torch.tensor([1])], expected["deeplift"].values[[1]]),
            (one[np.array([1])], expected["deeplift"].values[[1]]),
        ]:
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        assert one.numpy(3).dtype == np.float32
        assert one.shape == (10, 3, 16, 16)
        assert one.method == "deeplift"
        assert maps["integrated_gradients"].options["steps"] == 3
        assert one.done.tolist() == [row != 5 for row in range(10)]
        assert list(one.failed) == ["6"]
        assert "OSError" in one.failed["6"]
        assert maps.column("prediction")[:4].tolist() == expected.predictions.tolist()
        assert maps.column("relative_gap", "saliency") is None
        assert maps.photograph("<script>")[:3] == b"\xff\xd8\xff"
        assert maps.photograph(5) == b""
        assert "10 samples: saliency" in repr(maps)


def test_what_is_not_there_is_told(path):
    with attrbox.open_maps(path) as maps:
        one = maps["saliency"]
        with pytest.raises(InputError, match=r"no 'saliency' of 1 of the 10 .*'6'.*OSError"):
            one[:]
        with pytest.raises(IndexError, match="0 to 9"):
            one[10]
        with pytest.raises(UnknownNameError, match=r"'lost'.*Did you mean 'last'"):
            one["lost"]
        with pytest.raises(UnknownNameError, match="Did you mean 'saliency'"):
            maps["salency"]
    with pytest.raises(FileError, match=r"no '.*none"):
        attrbox.open_maps(path.with_name("none"))
    path.write_text("text")
    with pytest.raises(FileError, match="no HDF5 file"):
        attrbox.open_maps(path)
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(FileError, match="none that attrbox wrote"):
        attrbox.open_maps(path)


def test_files_that_were_written_in_one_go_are_read_too(path):
    result = attrbox.compare(net(), pictures(), METHODS)
    result.to_hdf5(path, overwrite=True)
    with attrbox.open_maps(path) as maps:
        for label, one in maps.items():
            np.testing.assert_array_equal(np.asarray(one), result[label].values)
    assert attrbox.verify(path) == []


def test_maps_feed_training(path):
    with attrbox.open_maps(path) as maps:
        data = StackDataset(pictures()[:5], torch.utils.data.Subset(maps["saliency"], range(5)))
        whole = list(DataLoader(data, batch_size=2))
        workers = list(DataLoader(data, batch_size=2, num_workers=2))
        assert [len(images) for images, _ in whole] == [2, 2, 1]
        for one, other in zip(whole, workers, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        again = pickle.loads(pickle.dumps(maps["saliency"]))
        assert torch.equal(again[0], maps["saliency"][0])
        again._maps.close()


def test_reading_a_map_looks_nothing_up_again(path, monkeypatch):
    looked_up = []
    original = h5py.Group.__getitem__
    monkeypatch.setattr(h5py.Group, "__getitem__", lambda *given: (looked_up.append(given[1]), original(*given))[1])
    with attrbox.open_maps(path) as maps:
        first = maps["saliency"][0]
        looked_up.clear()
        for _ in range(5):
            assert torch.equal(maps["saliency"][0], first)
            maps["saliency"][[1, 2]]
        assert looked_up == []
        maps["saliency"].done[:] = False  # a copy: the file is not concerned
        assert maps["saliency"].done.sum() == 9


def test_metrics_of_a_file(tmp_path):
    path = tmp_path / "maps.h5"
    export(path, methods=["saliency", "deeplift"])
    result = attrbox.compare(net(), pictures(), ["saliency", "deeplift"], batch_size=4)
    with attrbox.open_maps(path) as maps:
        scores = attrbox.evaluate(net(), pictures(), maps, ["morf", "sparseness"], progress=False)
    wanted = attrbox.evaluate(net(), pictures(), result, ["morf", "sparseness"], progress=False)
    for label in ("saliency", "deeplift"):
        torch.testing.assert_close(scores[label]["morf"].values, wanted[label]["morf"].values)


def test_an_interrupted_commit_is_finished_before_reading(path):
    whole = path.read_bytes()
    with Journal(path) as right:
        right.write(len(whole), {0: bytearray(whole[:4096])})
    path.write_bytes(b"torn" + whole[4:])
    with attrbox.open_maps(path) as maps:
        assert maps.samples == 10
    assert path.read_bytes() == whole
    assert not journal_of(path).exists()


# --------------------------------------------------------------------------------------------------- verify and repeat


def test_damage_is_found(path):
    assert attrbox.verify(path) == []
    with h5py.File(path) as file:
        place = file["maps/deeplift"].id.get_chunk_info(2).byte_offset
    with open(path, "r+b") as file:
        file.seek(place + 100)
        file.write(b"\x01")
    (problem,) = attrbox.verify(path)
    assert problem == "deeplift, sample '<script>': is not what was written"
    with h5py.File(path, "r+") as file:
        file["maps/saliency"][3, 0, 0, 0] = np.nan
    assert len(attrbox.verify(path)) == 2


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float16", "channels": "one"}, {"target": attrbox.top(2), "seed": list(range(10))}]
)
def test_a_sample_is_made_again_bit_by_bit(tmp_path, options):
    path = tmp_path / "maps.h5"
    data = Pairs(pictures(), broken=[5])
    methods = [*METHODS, "smoothgrad", "grad_cam"]
    export(path, data, methods=methods[:3], **options)
    export(path, data, methods=methods, **options)
    with attrbox.open_maps(path) as maps:
        for sample in (0, "6", 9):
            again = attrbox.recompute(maps, sample, net(), data)
            assert list(again) == list(maps)
            for label, one in maps.items():
                assert torch.equal(again[label], one[sample]), label
        with pytest.raises(InputError, match="no map of the sample '5'"):
            attrbox.recompute(maps, 5, net(), data)
        other = net()
        other[0].bias.data[0] += 1
        with pytest.raises(InputError, match="weights_sha256 differ"):
            attrbox.recompute(maps, 0, other, data)


# ------------------------------------------------------------------------------------------------------ merge and split


@pytest.mark.parametrize("virtual", [False, True])
def test_what_was_split_merges_to_the_same(path, tmp_path, virtual):
    parts = attrbox.split(path, 3)
    assert [part.name for part in parts] == [f"maps-{part}-of-3.h5" for part in (1, 2, 3)]
    with attrbox.open_maps(path) as whole, attrbox.open_maps(parts[1]) as part:
        assert part.ids == whole.ids[4:7]
        assert torch.equal(part["random"][0], whole["random"][4])
        assert list(part["random"].failed) == ["6"]
    merged = attrbox.merge(parts, tmp_path / "new" / "merged.h5", virtual=virtual)
    assert_same(path, merged)
    assert attrbox.verify(merged) == []
    with attrbox.open_maps(merged) as maps, attrbox.open_maps(path) as whole:
        assert list(maps) == list(whole)
        assert maps["deeplift"].attributes == whole["deeplift"].attributes
        assert maps.file["maps/deeplift"].is_virtual == virtual
        with pytest.raises(InputError, match="how its batches were made"):
            attrbox.recompute(maps, 0, net(), pictures())
    with pytest.raises(FileError, match="data_sha256"):
        export(merged, Pairs(pictures(), broken=[5]), ids=NAMES)
    parts[0].unlink()
    if virtual:
        with pytest.raises(FileError, match=r"shards, of which .*maps-1-of-3.h5' is missing"):
            attrbox.open_maps(merged)


@pytest.mark.parametrize("virtual", [False, True])
def test_methods_of_the_same_samples_are_united(tmp_path, virtual):
    for name, methods in (("one", ["saliency"]), ("two", ["deeplift"]), ("both", ["saliency", "deeplift"])):
        export(tmp_path / f"{name}.h5", methods=methods)
    merged = attrbox.merge([tmp_path / "one.h5", tmp_path / "two.h5"], tmp_path / "merged.h5", virtual=virtual)
    assert_same(merged, tmp_path / "both.h5")
    with pytest.raises(InputError, match="two have 'saliency'"):
        attrbox.merge([tmp_path / "one.h5", tmp_path / "both.h5"], tmp_path / "x.h5")


def test_what_does_not_belong_together_is_refused(tmp_path, path):
    (first, *_), new = attrbox.split(path, 2), tmp_path / "new.h5"
    for changes, message in (
        ({"seed": 1}, "seed 0 and 1"),
        ({"methods": ["saliency"]}, "same methods in each"),
        ({"methods": [("integrated_gradients", {"steps": 4})]}, "options of integrated_gradients"),
        ({"ids": NAMES}, "'\"quoted\"' is in more than one"),
    ):
        other = tmp_path / "other.h5"
        export(other, Pairs(pictures()), overwrite=True, **changes)
        with pytest.raises(InputError, match=message):
            attrbox.merge([first, other], new)
    with pytest.raises(InputError, match="at least one file"):
        attrbox.merge([], new)
    with pytest.raises(FileError, match="exists already"):
        attrbox.merge([first], path)
    for parts in (0, 11):
        with pytest.raises(OptionError, match="parts"):
            attrbox.split(path, parts)
    assert not new.exists()


@pytest.mark.parametrize("by", ["export", "to_hdf5"])
@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"target": [0, 0, 0]}, {"target": [1, 2, 3]}, "targets"),
        ({"target": 0}, {"target": 1}, "target"),
        ({"target": 0}, {"target": lambda out: out[:, 1]}, "target"),
        ({"target": 0, "shift": 1.0}, {"target": 0}, "scores"),
        ({"target": [0, 1, 2]}, {"target": [0, 1, 2]}, None),
    ],
)
def test_methods_of_the_same_samples_are_merged_and_those_of_others_refused(tmp_path, by, first, second, told):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for method, call in (("saliency", first), ("gradient_x_input", second)):
        shifted = images + call.get("shift", 0.0)
        target = call["target"]
        if by == "export":
            attrbox.export(model.eval(), shifted, tmp_path / f"{method}.h5", [method], target=target, progress=False)
        else:
            result = attrbox.compare(model.eval(), shifted, [method], target=target, progress=False)
            result.to_hdf5(tmp_path / f"{method}.h5")
    files = [tmp_path / "saliency.h5", tmp_path / "gradient_x_input.h5"]
    if told is None:
        attrbox.merge(files, tmp_path / "all.h5")
        with attrbox.open_maps(tmp_path / "all.h5") as maps:
            assert list(maps) == ["saliency", "gradient_x_input"]
    else:
        with pytest.raises(InputError, match=f"do not belong together.*{told}"):
            attrbox.merge(files, tmp_path / "all.h5")
        assert not (tmp_path / "all.h5").exists()

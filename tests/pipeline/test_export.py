"""Exports: the maps computed are the maps read, whatever is killed, full, broken, changed or odd on the way."""

import errno
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch
from exports import METHODS, Pairs, assert_same, content, export, net, pictures
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import attrbox
from attrbox.data.maps import journal
from attrbox.data.maps.journal import Journal, lock_of
from attrbox.data.models.loaded_model import LoadedModel, Preprocess
from attrbox.errors import FileError, InputError, NoGradientError, OptionError, TargetError
from attrbox.pipeline import job


@pytest.fixture
def path(tmp_path):
    return tmp_path / "maps.h5"


# ---------------------------------------------------------------------------------------------------------- round trip


def test_the_maps_read_are_the_maps_computed(path):
    summary = export(path, Pairs(pictures()))
    expected = attrbox.compare(net(), pictures(), METHODS, batch_size=4)
    with h5py.File(path) as file:
        for label, maps in expected.items():
            np.testing.assert_array_equal(file["maps"][label][:], maps.values)
            assert file["samples/done"][label][:].all()
        samples = file["samples"]
        np.testing.assert_array_equal(samples["score"][:], expected["saliency"].score)
        np.testing.assert_array_equal(samples["target"][:], expected["saliency"].target)
        np.testing.assert_array_equal(samples["prediction"][:], expected.predictions)
        assert samples["label"][:].tolist() == [row % 5 for row in range(10)]
        assert samples["id"].asstr()[:].tolist() == [str(row) for row in range(10)]
        np.testing.assert_array_equal(samples["relative_gap/deeplift"][:], expected["deeplift"].relative_gap.double())
        assert bytes(samples["photograph"][3][:3]) == b"\xff\xd8\xff"
    assert (summary.samples, summary.images, summary.maps, summary.failed) == (10, 10, 40, {})
    assert summary.complete
    assert "40 new maps of 10 images" in str(summary)
    assert os.listdir(path.parent) == ["maps.h5"]


@pytest.mark.parametrize("compression", ["gzip", "lzf", None])
def test_half_precision_and_compression(path, compression):
    export(path, dtype="float16", compression=compression, methods=["saliency"])
    expected = attrbox.explain(net(), pictures(), "saliency", batch_size=4).values
    with h5py.File(path) as file:
        assert file["maps/saliency"].compression == compression
        np.testing.assert_array_equal(file["maps/saliency"][:], expected.half())


def test_one_map_for_the_eye(path):
    export(path, channels="one", methods=["saliency", "grad_cam", "deeplift"])
    expected = attrbox.compare(net(), pictures(), ["saliency", "grad_cam", "deeplift"], batch_size=4)
    with h5py.File(path) as file:
        for label, maps in expected.items():
            np.testing.assert_array_equal(file["maps"][label][:, 0], maps.heatmap())


@pytest.mark.parametrize(
    "target",
    [
        3,
        list(range(5)) * 2,
        attrbox.top(2),
        attrbox.classes([1, 2]),
        attrbox.classes([[row % 5, 1] for row in range(10)]),
    ],
)
def test_targets(path, target):
    export(path, target=target, methods=["gradient_x_input"])
    expected = attrbox.explain(net(), pictures(), "gradient_x_input", target=target, batch_size=4)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["maps/gradient_x_input"][:], expected.values)
        np.testing.assert_array_equal(file["samples/target"][:], expected.target)


def test_labels_as_targets_and_functions(path):
    export(path, Pairs(pictures()), target="label", methods=["saliency"])
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["samples/target"][:], file["samples/label"][:])
    export(path, target=lambda output: output.sum(1), methods=["saliency"], overwrite=True)
    with h5py.File(path) as file:
        assert "target" not in file["samples"]


def test_seeds_of_each_sample(path):
    seeds = [7 * row for row in range(10)]
    export(path, seed=seeds, methods=["smoothgrad"])
    expected = attrbox.explain(net(), pictures(), "smoothgrad", seed=seeds, batch_size=4)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["maps/smoothgrad"][:], expected.values)
        assert file["samples/seed"][:].tolist() == seeds


def test_datasets_loaders_and_workers_make_the_same_file(tmp_path):
    images = pictures()
    labels = torch.arange(10) % 5
    export(tmp_path / "pairs.h5", Pairs(images))
    export(tmp_path / "tensors.h5", TensorDataset(images, labels))
    export(tmp_path / "workers.h5", TensorDataset(images, labels), workers=2)
    export(tmp_path / "loader.h5", DataLoader(TensorDataset(images, labels), batch_size=4), batch_size=None)
    dictionaries = [{"image": images[row], "label": int(labels[row])} for row in range(10)]
    collate = lambda items: (torch.stack([i["image"] for i in items]), torch.tensor([i["label"] for i in items]))  # noqa: E731
    export(tmp_path / "collated.h5", DataLoader(dictionaries, 4, collate_fn=collate), batch_size=None)
    for name in ("tensors", "workers", "loader", "collated"):
        assert_same(tmp_path / "pairs.h5", tmp_path / f"{name}.h5")


# -------------------------------------------------------------------------------------------------------------- resume


def test_it_goes_on_where_it_was_stopped(path, tmp_path):
    class Stops(Pairs):
        def __getitem__(self, row):
            if row == 6:
                raise KeyboardInterrupt
            return super().__getitem__(row)

    export(tmp_path / "whole.h5", Pairs(pictures()))
    with pytest.raises(KeyboardInterrupt):
        export(path, Stops(pictures()))
    with h5py.File(path) as file:
        assert file["samples/done/saliency"][:].tolist() == [True] * 4 + [False] * 6
    data = Pairs(pictures())
    summary = export(path, data)
    assert summary.images == 6
    assert sorted(data.read) == list(range(10))  # what is new, and the batch that is scored again
    assert_same(path, tmp_path / "whole.h5")
    before = path.read_bytes()
    assert export(path, Pairs(pictures())).images == 0
    assert path.read_bytes() == before


def test_a_method_that_is_added_is_all_that_is_computed(path, tmp_path, monkeypatch):
    export(tmp_path / "whole.h5", methods=["saliency", "deeplift"])
    export(path, methods=["saliency"])
    asked = []
    original = job.compare
    monkeypatch.setattr(job, "compare", lambda *a, **k: (asked.append(a[2]), original(*a, **k))[1])
    summary = export(path, methods=["saliency", "deeplift"])
    assert [[name for name, _ in methods] for methods in asked] == [["random"]] * 3 + [["deeplift"]] * 3  # scored again
    assert summary.maps == 10
    assert_same(path, tmp_path / "whole.h5")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target": 3}, "target"),
        ({"seed": 1}, "seed 0 there and 1 here"),
        ({"dtype": "float16"}, "dtype"),
        ({"channels": "one"}, "channels"),
        ({"compression": "lzf"}, "compression"),
        ({"batch_size": 5}, "batch_size"),
        ({"ids": [f"other{row}" for row in range(10)]}, "data_sha256"),
        ({"data": pictures(9)}, "samples 10 there and 9 here"),
        ({"data": pictures() + 1e-6}, "sample '0' is not what it was"),
        ({"methods": [("integrated_gradients", {"steps": 4})]}, "steps 3 there and 4 here"),
    ],
)
def test_what_has_changed_is_refused_and_named(path, change, named):
    methods = [("integrated_gradients", {"steps": 3})]
    export(path, methods=methods)
    before = path.read_bytes()
    with pytest.raises(FileError, match=named):
        export(path, **({"methods": methods} | change))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["maps.h5"]


def test_changed_models_are_refused(path):
    export(path, methods=["saliency"])
    other = net()
    with torch.no_grad():
        other[0].bias[0] += 1e-6
    with pytest.raises(FileError, match="weights_sha256"):
        export(path, methods=["saliency"], model=other)
    other = net()
    other[1] = nn.GELU()
    with pytest.raises(FileError, match="architecture_sha256"):
        export(path, methods=["saliency"], model=other)
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = 99
    with pytest.raises(FileError, match="schema 99"):
        export(path, methods=["saliency"])


def test_other_options_can_be_written_beside(path):
    export(path, methods=[("integrated_gradients", {"steps": 3})])
    for _ in range(2):  # the second time it is known
        export(path, methods=[("integrated_gradients", {"steps": 4})], keep_both=True)
    with h5py.File(path) as file:
        assert list(file["maps"]) == ["integrated_gradients", "integrated_gradients(steps=4)"]


def test_broken_and_foreign_files_stay(path):
    for make in (
        lambda: path.write_text("no HDF5"),
        lambda: path.write_bytes(b""),
        lambda: h5py.File(path, "w").close(),
        lambda: attrbox.compare(net(), pictures(2), ["saliency"]).to_hdf5(path, overwrite=True),
    ):
        make()
        before = path.read_bytes()
        with pytest.raises(FileError, match=r"maps\.h5.*[Cc]hoose another path"):
            export(path)
        assert path.read_bytes() == before
    with pytest.raises(FileError, match="exists already"):
        export(path, resume=False)
    with pytest.raises(InputError):  # an overwrite that fails replaces nothing
        export(path, Pairs(pictures(), broken=range(10)), overwrite=True)
    assert path.read_bytes() == before
    export(path, overwrite=True)
    export(path)


def test_a_truncated_file_is_refused(path):
    export(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(FileError, match="broken"):
        export(path)


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_batch_of_which_nothing_can_be_read(path):
    summary = export(path, Pairs(pictures(12), broken=range(4, 8)))
    assert set(summary.failed) == {"4", "5", "6", "7"}
    assert all(count == 8 for count in summary.done.values())


def test_what_fails_is_recorded_and_the_rest_goes_on(path):
    images = pictures()
    images[7, 0, 0, 0] = float("nan")
    data = Pairs(images, broken=[0, 5])
    summary = export(path, data)
    assert set(summary.failed) == {"0", "5", "7"}
    assert not summary.complete
    assert "<b>5</b>" in summary.failed["5"]
    with h5py.File(path) as file:
        for label in file["maps"]:
            done = file["samples/done"][label][:]
            assert done.tolist() == [row not in (0, 5, 7) for row in range(10)]
            assert "NaN" in file["samples/failed"][label].asstr()[7]
            assert file["samples/failed"][label].asstr()[0] == "OSError: no such <b>0</b>\\x00"
        assert file["samples/target"][5] == -1
        expected = attrbox.compare(net(), images[[4, 6]], METHODS, batch_size=4)
        np.testing.assert_array_equal(file["maps/deeplift"][:][[4, 6]], expected["deeplift"].values)
    assert export(path, data).images == 0  # known to fail
    data.broken = [5]
    assert export(path, data, retry=True).images > 0
    with h5py.File(path) as file:
        assert file["samples/done/saliency"][0]
        assert file["samples/failed/saliency"].asstr()[0] == ""
        assert "OSError" in file["samples/failed/saliency"].asstr()[5]


def test_maps_that_are_not_finite_are_recorded(path):
    class Broken(nn.Module):
        def forward(self, x):  # its gradient is infinite where the mean is zero
            mean = x.mean((1, 2, 3))
            return torch.stack([mean.abs().sqrt(), mean], 1)

    images = pictures()
    images[2] = 0
    summary = export(path, images, model=Broken().eval(), target=0, methods=["saliency", "random"])
    assert set(summary.failed) == {"2"}
    assert summary.done == {"saliency": 9, "random": 10}


def test_a_model_that_fails_on_one_sample(path):
    class Fussy(nn.Module):
        def forward(self, x):
            if (x[:, 0, 0, 0] > 100).any():
                raise ValueError("too bright")
            return x.flatten(1)[:, :4] ** 2

    images = pictures()
    images[6, 0, 0, 0] = 1000
    summary = export(path, images, model=Fussy().eval(), methods=["saliency", "gradient_x_input"])
    assert list(summary.failed) == ["6"]
    assert "too bright" in summary.failed["6"]
    assert summary.done == {"saliency": 9, "gradient_x_input": 9}
    images[:] = 1000
    with pytest.raises(attrbox.errors.ForwardError):
        export(path, images, model=Fussy().eval(), methods=["saliency"], overwrite=True)


def test_half_precision_leaves_out_what_it_would_lose(path):
    images = pictures()
    images[3] *= 1e9
    summary = export(path, images, methods=["gradient_x_input"], dtype="float16")
    assert "float16" in summary.failed["3"]


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": torch.zeros(0, 3, 4, 4)}, InputError, "at least one sample"),
        ({"data": Pairs(pictures(), broken=range(10))}, InputError, "None of the 10 samples"),
        ({"data": [torch.zeros(3, 16, 16), torch.zeros(3, 17, 16)]}, InputError, "one size"),
        ({"data": DataLoader(TensorDataset(pictures()), shuffle=True)}, InputError, "RandomSampler"),
        ({"data": type("Stream", (IterableDataset,), {"__iter__": lambda self: iter([])})()}, InputError, "Stream"),
        ({"data": (pictures() * 255).byte()}, InputError, "uint8"),
        ({"data": [Image.new("RGB", (16, 16))] * 3}, InputError, "preprocess="),
        ({"target": [1, 2, 3]}, TargetError, "10 in all, got 3"),
        ({"target": 7}, TargetError, "from 0 to 4"),
        ({"target": "tabby"}, TargetError, "'label'"),
        ({"target": "label"}, TargetError, "label of '0'"),
        ({"seed": [1, 2]}, OptionError, "10 in all, got 2"),
        ({"ids": ["a"] * 10}, InputError, "'a' more than once"),
        ({"ids": ["a"]}, InputError, "one id"),
        ({"methods": ["salency"]}, attrbox.errors.UnknownNameError, "saliency"),
        ({"dtype": "int8"}, OptionError, "dtype"),
        ({"compression": "zip"}, OptionError, "compression"),
        ({"channels": "two"}, OptionError, "channels"),
        ({"batch_size": 0}, OptionError, "batch_size"),
        ({"workers": -1}, OptionError, "workers"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(5, 2)).eval()}, attrbox.errors.ForwardError, "mat1"),
    ],
)
def test_bad_input_leaves_nothing_behind(path, change, error, message):
    with pytest.raises(error, match=message):
        export(path, **change)
    assert os.listdir(path.parent) == []


def test_a_model_without_a_gradient(path):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 3)

    with pytest.raises(NoGradientError):
        export(path, model=Constant().eval(), methods=["saliency"])


def test_image_folders(tmp_path, path):
    preprocess = Preprocess(16, 16, (0.0,) * 3, (1.0,) * 3)
    loaded = LoadedModel(net(), "tiny", preprocess, (0.0,) * 3, (1.0,) * 3, ("a", "b", "<i>c</i>", 'd"', "ü"))
    folder = tmp_path / "pictures"
    with pytest.raises(FileError, match="there is no"):
        export(path, folder, model=loaded)
    for name in ("cats/one.png", "cats/two.png", 'dogs/"quoted" <b>ü.png', "dogs/../dogs/three.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 18), (len(name) * 9, 90, 30)).save(folder / name)
    (folder / "dogs/broken.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match="preprocess="):
        export(path, folder)
    summary = export(path, folder, model=loaded, methods=["saliency"])
    assert list(summary.failed) == ["broken"]
    with h5py.File(path) as file:
        assert file["samples/id"].asstr()[:].tolist() == ["one", "two", '"quoted" <b>ü', "broken", "three"]
        assert file["samples/label"].asstr()[:].tolist() == ["cats", "cats", "dogs", "", "dogs"]
        assert file["classes"].asstr()[:].tolist() == ["a", "b", "<i>c</i>", 'd"', "ü"]
        assert file["samples/source"].asstr()[4] == str(folder / "dogs/three.png")
        assert file.attrs["model"] == "tiny"
    with pytest.raises(InputError, match="None of the 1 samples"):
        export(tmp_path / "other.h5", [folder / "dogs/broken.jpg"], model=loaded)
    assert not (tmp_path / "other.h5").exists()


def test_images_that_are_links_to_nothing_are_recorded(tmp_path, path):
    loaded = LoadedModel(net(), "tiny", Preprocess(16, 16, (0.0,) * 3, (1.0,) * 3))
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (20, 18), "red").save(folder / "one.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    summary = export(path, folder, model=loaded, methods=["saliency"])
    assert summary.samples == 2
    assert list(summary.failed) == ["gone"]
    assert "is a link to 'nowhere.png', which cannot be found" in summary.failed["gone"]
    assert export(path, folder, model=loaded, methods=["saliency"]).images == 0
    with attrbox.open_maps(path) as maps:
        assert "nowhere.png" in maps["saliency"].failed["gone"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(FileError, match=r"Cannot write beside .*Permission denied"):
        export(tmp_path / "locked" / "maps.h5")
    assert os.listdir(tmp_path / "locked") == []


@pytest.fixture
def disk(tmp_path):
    """A folder that is a file system of 1 MB: `disk("ro")` makes it read-only, `disk("rw")` the contrary."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")

    def remount(mode):
        subprocess.run(["mount", "-o", f"remount,{mode},size=1m", str(folder)], check=True)

    yield folder, remount
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_read_only(disk):
    folder, remount = disk
    export(folder / "maps.h5", methods=["saliency"])
    before = content(folder / "maps.h5")
    remount("ro")
    for path in (folder / "maps.h5", folder / "other.h5", folder / "below" / "maps.h5"):
        with pytest.raises(FileError, match=r"Cannot write beside .*Read-only file system"):
            export(path)
    assert os.listdir(folder) == ["maps.h5"]
    assert content(folder / "maps.h5").keys() == before.keys()
    with attrbox.open_maps(folder / "maps.h5") as maps:
        assert maps["saliency"].done.all()
    remount("rw")
    assert export(folder / "maps.h5").maps == 30


def test_a_disk_that_is_full(disk, tmp_path):
    folder, _ = disk
    path, ballast = folder / "maps.h5", folder / "ballast"
    export(tmp_path / "whole.h5", Pairs(pictures(60)))
    ballast.write_bytes(bytes(600_000))
    with pytest.raises(FileError, match=r"any further .*No space left on device.*make space"):
        export(path, Pairs(pictures(60)))
    with h5py.File(path) as file:  # by any reader
        done = file["samples/done/saliency"][:].sum()
        assert 0 < done < 60
    assert attrbox.verify(path) == []
    assert sorted(os.listdir(folder)) == ["ballast", "maps.h5"]
    with pytest.raises(FileError, match="No space left"):  # still no space
        export(path, Pairs(pictures(60)))
    ballast.unlink()
    assert export(path, Pairs(pictures(60))).images == 60 - done
    assert_same(path, tmp_path / "whole.h5")


def test_a_disk_too_full_to_begin(disk):
    folder, _ = disk
    with pytest.raises(OSError, match="No space"):
        (folder / "ballast").write_bytes(bytes(2_000_000))
    with pytest.raises(FileError, match="No space left"):
        export(folder / "maps.h5")
    assert os.listdir(folder) == ["ballast"]


def test_paths_that_cannot_be_files(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "maps.h5", tmp_path / "nul\0"):
        with pytest.raises(FileError):
            export(path)


# --------------------------------------------------------------------------------------- killed, full, and two at once


class Slow(Pairs):
    def __getitem__(self, row):
        time.sleep(0.002)
        return super().__getitem__(row)


def export_slowly(path, limit=None):
    """What other processes do; with a limit, writes beyond it fail with an error, as on a full disk."""
    torch.set_num_threads(1)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        export(path, Slow(pictures(60)))
    except FileError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


@pytest.fixture(scope="module")
def processes():
    """Processes that start fast, as they have imported attrbox."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attrbox"])
    return context


def start(processes, path, limit=None):
    """A process that exports, and has begun to."""
    process = processes.Process(target=export_slowly, args=(path, limit))
    process.start()
    while process.exitcode is None and not lock_of(path).exists():
        time.sleep(0.002)
    return process


def test_killed_at_any_moment_it_opens_and_goes_on(path, tmp_path, processes):
    export(tmp_path / "whole.h5", Pairs(pictures(60)))
    whole = content(tmp_path / "whole.h5")
    rng = random.Random(0)
    kills, reached = 0, 0
    while kills < 6:
        process = start(processes, path)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
        if path.exists():
            with attrbox.open_maps(path) as maps:
                done = maps["saliency"].done
                assert done.sum() >= reached
                reached = done.sum()
                for label, one in maps.items():
                    rows = np.flatnonzero(one.done)
                    np.testing.assert_array_equal(one.numpy(rows), whole[f"maps/{label}"][rows])
            assert attrbox.verify(path) == []
    assert kills > 2
    export(path, Pairs(pictures(60)))
    assert_same(path, tmp_path / "whole.h5")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.93])
def test_a_full_disk_leaves_a_readable_file_and_room_lets_it_go_on(path, tmp_path, processes, share):
    export(tmp_path / "whole.h5", Pairs(pictures(60)))
    process = start(processes, path, int((tmp_path / "whole.h5").stat().st_size * share))
    process.join()
    assert process.exitcode == 1
    with h5py.File(path) as file:  # by any reader
        done = file["samples/done/saliency"][:].sum()
        assert 0 < done < 60
    assert attrbox.verify(path) == []
    assert sorted(os.listdir(tmp_path)) == ["maps.h5", "whole.h5"]
    assert export(path, Pairs(pictures(60))).images == 60 - done
    assert_same(path, tmp_path / "whole.h5")


def test_a_full_disk_is_told(path, monkeypatch):
    def full(file, view):
        raise OSError(errno.ENOSPC, "No space left on device")

    export(path, methods=["saliency"])
    before = content(path)
    monkeypatch.setattr(journal, "_write_all", full)
    with pytest.raises(FileError, match=r"maps.h5' any further .*No space left.*make space"):
        export(path, methods=["saliency", "deeplift"])
    monkeypatch.undo()
    assert content(path).keys() == before.keys()
    assert attrbox.verify(path) == []


def die_at_the_first_batch(path):
    os.replace = lambda *names: os._exit(9)
    export(path)


def test_what_was_killed_at_its_first_batch_is_cleared_away(path, processes):
    process = processes.Process(target=die_at_the_first_batch, args=(path,))
    process.start()
    process.join()
    assert sorted(os.listdir(path.parent)) == [".attrbox-maps.h5.part", "maps.h5.lock"]
    export(path)
    assert os.listdir(path.parent) == ["maps.h5"]


def test_the_second_exporter_is_refused(path, processes):
    with Journal(path):
        for overwrite in (False, True):
            with pytest.raises(FileError, match="being written by another process"):
                export(path, overwrite=overwrite)
    process = start(processes, path)
    while process.exitcode is None and not path.exists():
        time.sleep(0.002)  # until it has locked the file that it made
    with pytest.raises(FileError, match="being written by another process"):
        export(path, Pairs(pictures(60)))
    process.kill()
    process.join()
    export(path, Pairs(pictures(60)))


def test_targets_of_another_number_leave_no_file(path):
    with pytest.raises(TargetError, match="10 in all, got 9"):
        export(path, target=[1] * 9, methods=["saliency"])
    assert not os.path.exists(path)


def test_what_is_in_two_files_is_named(tmp_path):
    for name, ids in (("one", "abc"), ("other", "dbe")):
        export(tmp_path / f"{name}.h5", pictures(3), methods=["saliency"], ids=list(ids))
    with pytest.raises(InputError, match="'b' is in more than one of them"):
        attrbox.merge([tmp_path / "one.h5", tmp_path / "other.h5"], tmp_path / "both.h5")


def test_without_photographs(path, tmp_path):
    export(tmp_path / "with.h5", methods=["saliency"])
    export(path, methods=["saliency"], thumbnails=False)
    found, other = content(path), content(tmp_path / "with.h5")
    assert found.keys() == other.keys() - {"samples/photograph"}
    assert attrbox.verify(path) == []
    assert export(path, methods=["saliency", "deeplift"], thumbnails=False).maps == 10

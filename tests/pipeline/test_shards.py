"""Several processes write what one would have written."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import TINY, run
from exports import Pairs, assert_same, content, export, pictures
from PIL import Image

import attrbox
from attrbox.errors import FileError, InputError, OptionError
from attrbox.pipeline.shards import Shard

METHODS = ["saliency", "deeplift", "smoothgrad"]


def data():
    return Pairs(pictures(11), broken=[5])


def one_rank(rank, world, path, meeting):
    """What each process does under torchrun, once it has joined the others."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    export(path, data(), METHODS, batch_size=3)
    torch.distributed.destroy_process_group()


def test_two_processes_write_what_one_writes(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attrbox"])
    path = tmp_path / "maps.h5"
    ranks = [context.Process(target=one_rank, args=(rank, 2, path, tmp_path / "meeting")) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    export(tmp_path / "whole.h5", data(), METHODS, batch_size=3)
    assert_same(path, tmp_path / "whole.h5")
    assert attrbox.verify(path) == []
    with attrbox.open_maps(path) as maps:
        assert maps["saliency"].dataset.is_virtual


def launch(*arguments, cwd):
    """The command under torchrun, as two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "attrbox"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(attrbox.__file__).parents[1]), str(Path(__file__).parents[1] / "support")]
        ),
    }
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_torchrun(tmp_path):
    (tmp_path / "pictures").mkdir()
    for index, colour in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (20, 16 + index), colour).save(tmp_path / "pictures" / f"{colour}.png")
    command = [
        "export",
        "pictures",
        "--model",
        TINY,
        "-m",
        "saliency,smoothgrad:n_samples=3",
        "--batch-size",
        "2",
        "--out",
    ]
    done = launch(*command, "maps.h5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["maps-1-of-2.h5", "maps-2-of-2.h5", "maps.h5", "pictures"]
    assert "maps-1-of-2.h5: 8 new maps of 4 images" in done.stdout
    assert "maps-2-of-2.h5: 2 new maps of 1 images" in done.stdout
    with pytest.MonkeyPatch.context() as here:
        here.chdir(tmp_path)
        assert run(*command, "whole.h5").exit_code == 0
    assert_same(tmp_path / "maps.h5", tmp_path / "whole.h5")


def test_a_share_that_is_missing_is_made_alone(tmp_path):
    path = tmp_path / "maps.h5"
    export(path, data(), METHODS, batch_size=3, shard=Shard(1, 3))
    assert export(path, data(), METHODS, batch_size=3, shard=Shard(0, 3)).whole is None
    assert not path.exists()
    last = export(path, data(), METHODS, batch_size=3, shard=Shard(2, 3))
    assert (last.images, last.path.name, last.whole) == (2, "maps-3-of-3.h5", path)
    assert str(last).endswith("maps.h5: joins all shards")
    export(tmp_path / "whole.h5", data(), METHODS, batch_size=3)
    assert_same(path, tmp_path / "whole.h5")
    written = path.stat().st_mtime_ns
    assert export(path, data(), METHODS, batch_size=3, shard=Shard(0, 3)).images == 0
    assert path.stat().st_mtime_ns == written
    for index in range(3):  # a method that comes later is joined when the last share has it
        export(path, data(), [*METHODS, "random"], batch_size=3, shard=Shard(index, 3))
        assert ("maps/random" in content(path)) == (index == 2)
    Shard(1, 3).path(path).unlink()
    with pytest.raises(FileError, match="is missing"):
        attrbox.open_maps(path)


def test_targets_and_seeds_of_each_sample_are_shared_out(tmp_path):
    options = {"target": [row % 5 for row in range(10)], "seed": list(range(10)), "methods": ["smoothgrad"]}
    for index in range(2):
        export(tmp_path / "maps.h5", shard=Shard(index, 2), **options)
    export(tmp_path / "whole.h5", **options)
    assert_same(tmp_path / "maps.h5", tmp_path / "whole.h5")


def test_what_torchrun_tells_and_the_option(tmp_path, monkeypatch):
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (20, 16), colour).save(tmp_path / f"{colour}.png")
    command = [
        "export",
        tmp_path,
        "--model",
        TINY,
        "-m",
        "saliency",
        "--batch-size",
        "1",
        "--out",
        tmp_path / "maps.h5",
    ]
    assert Shard.current() is None
    assert run(*command, "--shard", "1/2").exit_code == 0
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Shard.current() == Shard(1, 2)
    assert not (tmp_path / "maps.h5").exists()
    assert run(*command).exit_code == 0
    with attrbox.open_maps(tmp_path / "maps.h5") as maps:
        assert maps.ids == ["blue", "green", "red"]


def test_shares_that_cannot_be():
    assert [Shard(index, 3).rows(10, 3) for index in range(3)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9]]
    with pytest.raises(InputError, match="at least 5 batches"):
        Shard(0, 5).rows(10, 3)
    for text in ("0/2", "3/2", "1", "a/b", "1/"):
        with pytest.raises(OptionError, match="shard"):
            Shard.parsed(text)
    assert Shard.parsed("2/8") == Shard(1, 8)


def test_a_file_that_is_not_made_of_shards_stays(tmp_path):
    path = tmp_path / "maps.h5"
    export(path)
    with pytest.raises(FileError, match="not made of shards"):
        export(path, shard=Shard(0, 2))

"""A seed means the same everywhere: each sample has its own stream, by the seed and its position."""

import importlib
import shutil
from pathlib import Path

import h5py
import pytest
import torch
from contracts import DRAWN
from exports import Pairs, content, export, net, pictures
from nets import FAST

import attrbox
from attrbox.core.random_streams import numbers, streams
from attrbox.errors import InputError
from attrbox.pipeline.shards import Shard

FILES = Path(__file__).parents[1] / "support/files"
MODEL, X, SEED = net(), pictures(5), 11


@pytest.mark.parametrize("method", sorted(DRAWN))
def test_a_sample_draws_the_same_in_every_call(method, tmp_path, monkeypatch):
    options = FAST.get(method, {})
    whole = attrbox.explain(MODEL, X, method, seed=SEED, target=1, progress=False, **options)
    twins = attrbox.explain(MODEL, X[[0, 0]], method, seed=SEED, target=1, progress=False, **options).values
    assert not torch.equal(twins[0], twins[1])  # the same image, but another stream
    own = streams(SEED, len(X))
    alone = attrbox.explain(MODEL, X[3:4], method, seed=[own[3]], target=1, progress=False, **options).values
    torch.testing.assert_close(alone[0], whole.values[3], rtol=1e-4, atol=1e-6)

    export(tmp_path / "maps.h5", X, [(method, options)], MODEL, seed=SEED, target=1, batch_size=2)
    for index in range(2):
        shard = Shard(index, 2)
        export(tmp_path / "parts.h5", X, [(method, options)], MODEL, seed=SEED, target=1, batch_size=2, shard=shard)
    for name in ("maps", "parts"):
        with attrbox.open_maps(tmp_path / f"{name}.h5") as maps:
            assert maps.seeds == list(own)
            torch.testing.assert_close(maps[method][:], whole.values.float(), rtol=1e-4, atol=1e-6)

    monkeypatch.setattr(importlib.import_module("attrbox.metrics.evaluation"), "_RANKINGS", 1)  # an image at a time
    metric = ("sensitivity_max", {"radius": 1e-9, "n_samples": 1})  # explains again, with hardly any change
    of_zero = attrbox.explain(MODEL, X, method, target=1, progress=False, **options).values
    for maps, again in ((whole, {}), (of_zero, {method: (method, options)})):
        scores = attrbox.evaluate(MODEL, X, {method: maps}, [metric], explainers=again, target=1, progress=False)
        assert scores[method]["sensitivity_max"].mean < 1e-2


def test_evaluate_and_its_controls_draw_from_the_same_streams():
    scores = attrbox.evaluate(MODEL, X, {"m": X.sum(1)}, ["complexity"], seed=SEED, progress=False)
    named = attrbox.evaluate(MODEL, X, {"m": X.sum(1)}, ["complexity"], seed=streams(SEED, 5), progress=False)
    assert torch.equal(scores["random"]["complexity"].values, named["random"]["complexity"].values)


def test_streams_are_unrelated():
    drawn = numbers(streams(0, 200) + streams(1, 200), 0, (500,), torch.zeros(1, dtype=torch.float64))
    correlations = torch.corrcoef(drawn).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / 500**0.5  # of 80,000 pairs, 6 standard deviations


# ------------------------------------------------------------- files of version 0.1, where all samples had one stream


@pytest.fixture(params=["schema1.h5", "schema1_interrupted.h5"])
def old(request, tmp_path):
    path = shutil.copy(FILES / request.param, tmp_path / "old.h5")
    with h5py.File(path) as file:
        assert "seed" not in file["samples"]
        assert file["maps/random"].attrs["seed"] == 0
    return path


def test_their_one_stream_stays_theirs(old, tmp_path):
    with attrbox.open_maps(old) as maps:
        assert maps.seeds == [0] * 10
        made = maps["random"].attribution(range(8))
    torch.testing.assert_close(
        made.values, attrbox.explain(net(), pictures()[:8], "random", seed=made.provenance.seed, progress=False).values
    )
    assert torch.equal(made.values[0], made.values[1])
    export(old, Pairs(pictures()), compression="gzip")
    export(old, Pairs(pictures()), ["random", ("smoothgrad", {"n_samples": 2})], compression="gzip")
    with attrbox.open_maps(old) as maps:
        assert maps.seeds == [0] * 10
        expected = attrbox.explain(net(), pictures(), "smoothgrad", seed=[0] * 10, n_samples=2, progress=False)
        torch.testing.assert_close(maps["smoothgrad"][:], expected.values, rtol=1e-3, atol=1e-5)
        assert torch.equal(attrbox.recompute(maps, 9, net(), Pairs(pictures()))["random"], maps["random"][9])
    assert "samples/seed" not in content(old)


@pytest.mark.parametrize("seed", [0, [3] * 10, [0] * 10])
def test_they_are_merged_with_files_of_the_same_streams_alone(old, seed, tmp_path):
    export(old, Pairs(pictures()), compression="gzip")
    export(tmp_path / "new.h5", Pairs(pictures()), ["smoothgrad"], compression="gzip", seed=seed)
    files = [old, tmp_path / "new.h5"]
    if seed == [0] * 10:
        with attrbox.open_maps(attrbox.merge(files, tmp_path / "both.h5")) as maps:
            assert maps.seeds == seed
    else:
        with pytest.raises(InputError, match="other random numbers"):
            attrbox.merge(files, tmp_path / "both.h5")


def test_files_of_the_same_samples_and_streams_are_merged(tmp_path):
    seeds = {"random": [1, 2, 3, 4, 5], "saliency": [1, 2, 3, 4, 5], "smoothgrad": [1, 2, 3, 4, 6]}
    for method, seed in seeds.items():
        export(tmp_path / f"{method}.h5", X, [method], MODEL, seed=seed)
    attrbox.merge([tmp_path / "random.h5", tmp_path / "saliency.h5"], tmp_path / "both.h5")
    with attrbox.open_maps(tmp_path / "both.h5") as maps:
        assert maps.seeds == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="other random numbers"):
        attrbox.merge([tmp_path / "random.h5", tmp_path / "smoothgrad.h5"], tmp_path / "all.h5")

"""Old names of options work for one release, with a warning that has the new name."""

import json
import re
import warnings

import h5py
import pytest
import torch
from command_line import run
from exports import content, export
from metric_contracts import MASKS, QUICK
from nets import FAST, images, relu_net

import attrbox
from attrbox.errors import InputError, OptionError, RenamedWarning
from attrbox.methods.masking.generators import MaskGenerator, masks
from attrbox.pipeline.config import parse
from attrbox.pipeline.report.page import write_report

REGISTRIES = {"method": attrbox.method_registry, "metric": attrbox.metric_registry}
RENAMED = [
    (kind, name, info.formerly, info.name)
    for kind, registry in REGISTRIES.items()
    for name, spec in registry.items()
    for info in spec.options
    if info.formerly
]
VALUES = {"n_samples": 3, "area_fractions": (0.3,), "fractions": (0.5,), "max_side": 2}  # others: 0.2
MODEL, X = relu_net(), images(2, 3, 8, 8)
OLD, NEW = ("smoothgrad", {"samples": 3}), ("smoothgrad", {"n_samples": 3})


def warned():
    return pytest.warns(RenamedWarning)


def made(kind, name, options):
    if kind == "method":
        return attrbox.explain(MODEL, X, name, progress=False, **options).values
    maps, again = {"m": torch.linspace(-1, 1, 128).view(2, 8, 8)}, {"m": "saliency"}
    scores = attrbox.evaluate(MODEL, X, maps, [(name, options)], masks=MASKS[:2], explainers=again, progress=False)
    return scores["m"][name].values


def test_there_are_renamed_options():
    assert len(RENAMED) >= 20
    assert {kind for kind, *_ in RENAMED} == set(REGISTRIES)


@pytest.mark.parametrize(("kind", "name", "old", "new"), RENAMED)
def test_an_old_name_means_the_new_one(kind, name, old, new):
    value, spec = VALUES.get(new, 0.2), REGISTRIES[kind][name]
    quick = {key: some for key, some in (FAST | QUICK).get(name, {}).items() if key != new}
    expected = made(kind, name, quick | {new: value})
    with warned() as caught:
        settings = spec.settings(spec.create(quick | {old: value}))
    assert settings[new] == value
    assert old not in settings
    assert len(caught) == 1
    assert f"{old!r} of the {kind} {name!r} is called {new!r} now" in str(caught[0].message)
    with warned():
        assert torch.equal(made(kind, name, quick | {old: value}).nan_to_num(9), expected.nan_to_num(9))
    with pytest.raises(InputError, match=f"{old!r} and {new!r}"):
        spec.create({old: value, new: value})


@pytest.mark.parametrize("kind", REGISTRIES)
def test_units_stand_in_the_names(kind):
    """Shares are called fractions, numbers of draws n_samples, and neither is called otherwise."""
    for name, spec in REGISTRIES[kind].items():
        for info in spec.options:
            if re.search(r"\b(as a|this|of this|largest) share\b|\bshares of\b", info.help):
                assert "fraction" in info.name, (name, info)
            assert info.name not in ("samples", "draws", "subsets", "masks", "resamples", "shares", "positions"), name


def compared(entry, path):
    del path
    return attrbox.compare(MODEL, X, [entry, "saliency"], progress=False)["smoothgrad"].values


def explained_again(entry, path):
    del path
    maps = {"m": compared(NEW, None)}
    metrics = [("sensitivity_max", {"n_samples": 2})]
    return attrbox.evaluate(MODEL, X, maps, metrics, explainers={"m": entry}, progress=False)["m"].values()


def from_toml(entry, path):
    del path
    name, ((key, value),) = entry[0], entry[1].items()
    config = parse(f'methods = [{{name = "{name}", {key} = {value}}}]', "a.toml")
    assert config.chosen_methods == [NEW]
    return parse(config.to_toml(), "again").chosen_methods


def exported(entry, path):
    export(path, X, [entry, "saliency"], MODEL, batch_size=1)  # several batches, one warning
    return content(path)["maps/smoothgrad"].tolist()


@pytest.mark.parametrize("way", [compared, explained_again, from_toml, exported])
def test_every_way_takes_old_names_and_warns_once(way, tmp_path):
    expected = way(NEW, tmp_path / "new.h5")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = way(OLD, tmp_path / "old.h5")
    assert [one.category for one in caught if one.category is RenamedWarning] == [RenamedWarning]
    if way in (compared, explained_again):  # by this file, and not by tests/support or pydantic
        assert all(one.filename == __file__ for one in caught)
    assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else str(found) == str(expected)


def test_labels_have_the_new_names():
    with warned():
        labels = list(attrbox.compare(MODEL, X, [OLD, ("smoothgrad", {"samples": 2})], progress=False))
    assert labels == ["smoothgrad", "smoothgrad(n_samples=2)"]


def aged(path):
    """Give the options in a file the names that version 0.1 wrote."""
    with h5py.File(path, "r+") as file:
        for dataset in file["maps"].values():
            options = json.loads(dataset.attrs["options"])
            spec = attrbox.method_registry[dataset.attrs["method"]]
            names = {info.name: info.formerly or info.name for info in spec.options}
            dataset.attrs["options"] = json.dumps({names[name]: value for name, value in options.items()})
            assert options.keys() != {names[name] for name in options}
    return path


@pytest.fixture
def old_file(tmp_path):
    methods = [NEW, ("smoothgrad", {"n_samples": 2}), ("rise", FAST["rise"])]
    export(tmp_path / "maps.h5", X, methods, MODEL)
    with h5py.File(tmp_path / "maps.h5", "r+") as file:  # the label of its time
        assert file["maps/smoothgrad(n_samples=2)"].attrs["label"] == "smoothgrad(n_samples=2)"
    return aged(tmp_path / "maps.h5"), methods


def test_files_with_old_names_are_read_made_again_and_measured(old_file):
    path, _ = old_file
    assert attrbox.verify(path) == []
    with attrbox.open_maps(path) as maps:
        again = attrbox.recompute(maps, 1, MODEL, X)
        for label, values in again.items():
            assert torch.equal(values, torch.as_tensor(maps[label][[1]])[0])
        sources = {label: maps[label].attribution(range(2)) for label in maps}
        scores = attrbox.evaluate(MODEL, X, sources, [("sensitivity_max", {"n_samples": 1, "radius": 1e-9})])
    assert all(score["sensitivity_max"].mean < 1e-3 for label, score in scores.items() if label in sources)


def test_files_with_old_names_go_on(old_file):
    path, methods = old_file
    summary = export(path, X, [*methods, "saliency"], MODEL)
    assert summary.maps == len(X)  # of the new method; the others are known
    assert set(summary.done) == {"smoothgrad", "smoothgrad(n_samples=2)", "rise", "saliency"}


def test_commands_take_old_names(old_file, tmp_path):
    path, _ = old_file
    for flag in (["--n-samples", "1"], ["--samples", "1"], ["--samples=1"]):
        found = run("report", path, "--out", tmp_path / "page.html", *flag)
        assert found.exit_code == 0
        assert ("--samples is called --n-samples now" in found.stderr) == (flag[0] != "--n-samples")
    assert run("report", path, "--samples", 1, "--n-samples", 1).exit_code == 2
    with warned():
        write_report(path, tmp_path / "page.html", samples=1)


def test_arguments_have_old_names_too():
    values, fractions = torch.zeros(2), torch.linspace(0, 1, 3)
    with warned() as caught:
        measurement = attrbox.Measurement(values, torch.zeros(2, 3), positions=fractions)
    assert measurement.fractions is fractions
    assert caught[0].filename == __file__
    with pytest.raises(InputError, match="'positions' and 'fractions'"):
        attrbox.Measurement(values, positions=fractions, fractions=fractions)


def test_an_option_cannot_have_the_old_name_of_another():
    class Wide(MaskGenerator):
        sigma: float = 0.5  # which nobody would read

        def masks(self, map, draw):
            return map, map

    with pytest.raises(OptionError, match="'sigma' is called 'sigma_fraction' now"):
        masks.register("wide")(Wide)

"""Small exports for tests."""

from dataclasses import fields

import h5py
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import attrbox
from attrbox.pipeline.settings import GROUPS

METHODS = ["saliency", "deeplift", ("integrated_gradients", {"steps": 3}), "random"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 5)
    ).eval()


def pictures(count=10):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def grouped(**options):
    """The arguments of `attrbox.export`: settings in their groups, the rest as they are."""
    homes = {field.name: group for group, cls in GROUPS.items() for field in fields(cls)}
    found = {name: value for name, value in options.items() if name not in homes}
    for group, cls in GROUPS.items():
        if own := {name: value for name, value in options.items() if homes.get(name) == group}:
            found[group] = cls(**own)
    return found


def export(path, data=None, methods=METHODS, model=None, **options):
    options = grouped(**({"batch_size": 4, "progress": False} | options))
    return attrbox.export(model or net(), pictures() if data is None else data, path, methods, **options)


def content(path):
    """Everything in a file that its samples have, by name."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def assert_same(one, other):
    one, other = content(one), content(other)
    assert one.keys() == other.keys()
    for name, values in one.items():
        if name == "samples/photograph":
            assert all(np.array_equal(*pair) for pair in zip(values, other[name], strict=True))
        else:
            np.testing.assert_array_equal(values, other[name], err_msg=name)


class Pairs(Dataset):
    """Images with labels; some cannot be read."""

    def __init__(self, images, broken=(), label=lambda row: row % 5):
        self.images, self.broken, self.label = images, broken, label
        self.read = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        self.read.append(row)
        if row in self.broken:
            raise OSError(f"no such <b>{row}</b>\0")
        return self.images[row], self.label(row)

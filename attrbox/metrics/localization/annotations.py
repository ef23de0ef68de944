"""Object masks from annotations: boxes, and the targets of torchvision's VOC and COCO data sets.

    objects = [voc_objects(target) for _, target in VOCDetection(root, image_set="test")]
    pairs = object_pairs(objects, {"cat": 281, "dog": 207})          each image once for each of its classes
    maps = attrbox.compare(model, images[pairs.rows], [...], target=pairs.targets)
    attrbox.evaluate(model, images[pairs.rows], maps, ["pointing_game"], masks=pairs.masks)

Masks have the size of the photograph; so the images must show all of it, resized but not cropped.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.path import Path as Polygon
from torch import Tensor

from attrbox.errors import InputError


@dataclass(frozen=True, eq=False)
class Objects:
    """All objects of one class in one image.

    Attributes:
        mask: bool [H, W].
        difficult: whether they belong to the pointing game's difficult subset: they take less than a quarter of the
            image, and there are objects of another class.
    """

    mask: Tensor
    difficult: bool


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images, each once for each of its classes.

    Attributes:
        rows: which image, [M].
        targets: which class of the model, [M].
        masks: bool [H, W] each.
        difficult: bool [M].
    """

    rows: Tensor
    targets: Tensor
    masks: list[Tensor]
    difficult: Tensor


def box_mask(boxes: Sequence[Sequence[float]], height: int, width: int) -> Tensor:
    """The pixels whose centres lie in one of the boxes (left, top, right, bottom), bool [H, W].

    Coordinates are those of pixel borders: the box of the whole image is (0, 0, W, H).

    Raises:
        InputError: a box is not four numbers in order.
    """
    mask = torch.zeros(height, width, dtype=torch.bool)
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    for box in boxes:
        if len(box) != 4 or not (box[0] <= box[2] and box[1] <= box[3]):
            raise InputError(f"Expected boxes as (left, top, right, bottom), got {list(box)}.")
        left, top, right, bottom = box
        mask |= ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))
    return mask


def voc_objects(target: Mapping[str, Any]) -> dict[str, Objects]:
    """The objects by class name of a target of `torchvision.datasets.VOCDetection`.

    Classes of which all objects are marked as difficult are left out, as in the published game.

    Raises:
        InputError: the target has another form.
    """
    try:
        annotation = target["annotation"]
        height, width = int(annotation["size"]["height"]), int(annotation["size"]["width"])
        boxes: dict[str, list[tuple[float, ...]]] = {}
        clear = set()
        for one in annotation["object"]:
            # VOC counts pixels from 1, both ends included.
            left, top, right, bottom = (float(one["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax"))
            boxes.setdefault(one["name"], []).append((left - 1, top - 1, right, bottom))
            if not int(one.get("difficult", 0)):
                clear.add(one["name"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"Expected a target of torchvision.datasets.VOCDetection, {{'annotation': {{'size': ..., 'object': "
            f"[...]}}}}, but {type(error).__name__}: {error}."
        ) from error
    masks = {name: box_mask(some, height, width) for name, some in boxes.items()}
    return {name: objects for name, objects in _with_difficulty(masks).items() if name in clear}


def coco_objects(
    target: Sequence[Mapping[str, Any]], height: int, width: int, *, boxes: bool = False
) -> dict[int, Objects]:
    """The objects by category of a target of `torchvision.datasets.CocoDetection`.

    Crowds (`iscrowd`) are no objects and are left out.

    Args:
        target: a list of annotations with `category_id`, `bbox` and `segmentation`.
        height, width: of the photograph.
        boxes: take the boxes instead of the outlines.

    Raises:
        InputError: the target has another form.
    """
    masks: dict[int, Tensor] = {}
    try:
        for one in target:
            if one.get("iscrowd", 0):
                continue
            outline = one.get("segmentation")
            if boxes or not outline:
                left, top, across, down = map(float, one["bbox"])
                mask = box_mask([(left, top, left + across, top + down)], height, width)
            else:
                mask = _polygons(outline, height, width)
            category = int(one["category_id"])
            masks[category] = masks[category] | mask if category in masks else mask
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            "Expected a target of torchvision.datasets.CocoDetection, a list of annotations with 'category_id', 'bbox' "
            f"and polygons as 'segmentation', but {type(error).__name__}: {error}."
        ) from error
    return _with_difficulty(masks)


def _polygons(outlines: Sequence[Sequence[float]], height: int, width: int) -> Tensor:
    """The pixels whose centres lie inside of polygons x0, y0, x1, y1, ..., bool [H, W]."""
    y, x = np.mgrid[:height, :width] + 0.5
    centres = np.stack([x.ravel(), y.ravel()], 1)
    inside = np.zeros(height * width, dtype=bool)
    for outline in outlines:
        inside |= Polygon(np.asarray(outline, dtype=float).reshape(-1, 2)).contains_points(centres)
    return torch.from_numpy(inside.reshape(height, width))


def _with_difficulty(masks: Mapping[Any, Tensor]) -> dict[Any, Objects]:
    return {
        name: Objects(mask, len(masks) > 1 and mask.to(torch.float32).mean().item() < 0.25)
        for name, mask in masks.items()
    }


def object_pairs(objects: Sequence[Mapping[Any, Objects]], classes: Mapping[Hashable, int]) -> Pairs:
    """Each image once for each of its classes that the model knows.

    Args:
        objects: of each image, by class name or category.
        classes: the model's class for each of those; what is not in it is left out.

    Raises:
        InputError: no image has an object of these classes.
    """
    found = [
        (row, classes[name], some) for row, one in enumerate(objects) for name, some in one.items() if name in classes
    ]
    if not found:
        raise InputError(f"Expected objects of the classes {list(classes)[:10]}, got none in {len(objects)} images.")
    rows, targets, some = zip(*found, strict=True)
    return Pairs(
        torch.tensor(rows),
        torch.tensor(targets),
        [one.mask for one in some],
        torch.tensor([one.difficult for one in some]),
    )

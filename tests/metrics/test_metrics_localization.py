"""Pointing games, shares on the object, mosaics and annotations."""

import pytest
import torch
from nets import images, squeeze_excitation_net
from snapshots import nothing_changes
from torch import Tensor, nn

import attrbox
from attrbox.errors import InputError, OptionError
from attrbox.metrics.localization.annotations import box_mask, coco_objects, object_pairs, voc_objects
from attrbox.metrics.localization.mosaics import grid_cells, mosaics


def measure(maps: Tensor, masks, *metrics, **options):
    """The scores of one method; no model is needed."""
    x = torch.zeros(len(maps), 1, *maps.shape[1:], dtype=maps.dtype)
    return attrbox.evaluate(None, x, {"m": maps}, metrics, masks=masks, progress=False, **options)["m"]


def one_at(row: int, column: int, height: int = 40, width: int = 40) -> Tensor:
    plane = torch.zeros(1, height, width)
    plane[0, row, column] = 1
    return plane


@pytest.mark.parametrize(("distance", "hit"), [(0, 1), (14, 1), (15, 0), (16, 0)])
def test_the_tolerance_is_strict(distance, hit):
    values = measure(one_at(20, 5), one_at(20, 5 + distance), "pointing_game")["pointing_game"].values
    assert values.tolist() == [hit]


def test_distances_are_euclidean_and_any_pixel_of_the_object_counts():
    metric = ("pointing_game", {"tolerance": 5})
    masks = torch.cat([one_at(13, 14), one_at(13, 13), one_at(39, 39) + one_at(10, 14)])
    values = measure(one_at(10, 10).repeat(3, 1, 1), masks, metric)["pointing_game"].values
    assert values.tolist() == [0, 1, 1]  # (3, 4) is exactly 5 away


def test_an_empty_object_mask_is_not_a_hit():
    scores = measure(
        torch.ones(2, 8, 8), torch.zeros(2, 8, 8), "pointing_game", "relevance_mass", "relevance_rank",
        "grid_pointing_game",
    )  # fmt: skip
    assert scores["pointing_game"].values.tolist() == [0, 0]
    assert scores["relevance_mass"].values.tolist() == [0, 0]
    assert scores["grid_pointing_game"].values.tolist() == [0, 0]
    assert scores["relevance_rank"].left_out.all()


def test_the_mean_is_over_classes():
    maps = one_at(0, 0).repeat(4, 1, 1)
    masks = torch.cat([one_at(0, 0), one_at(0, 0), one_at(39, 39), one_at(0, 0)])
    target = [3, 3, 3, 7]
    scores = measure(maps, masks, "pointing_game", ("pointing_game", {"per_class": False}), target=target)
    by_class, plain = scores.values()
    assert by_class.mean == pytest.approx((2 / 3 + 1) / 2)
    assert plain.mean == pytest.approx(3 / 4)
    assert by_class.interval[0] <= by_class.mean <= by_class.interval[1]


def test_ties_at_the_maximum_are_broken_by_the_seed():
    maps, masks = torch.zeros(400, 8, 8), torch.zeros(400, 8, 8)
    masks[:, :, :2] = 1  # a quarter of the image
    metric = ("pointing_game", {"tolerance": 1})
    first, again, other = (measure(maps, masks, metric, seed=s)["pointing_game"].values for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.mean().item() == pytest.approx(0.25, abs=0.08)


def test_maps_are_resized_to_the_photograph_of_the_mask():
    maps, mask = torch.zeros(1, 8, 8), torch.zeros(80, 160, dtype=torch.bool)
    maps[0, 2, 5] = 1  # its centre is at row 25, column 110 of the mask
    mask[25, 110 + 13] = True
    assert measure(maps, [mask], "pointing_game")["pointing_game"].values.item() == 1
    assert measure(maps, [mask.roll(3, 1)], "pointing_game")["pointing_game"].values.item() == 0


def test_smoothing_moves_the_point_to_the_broader_peak():
    maps, mask = one_at(5, 5), one_at(30, 30)
    maps[0, 28:33, 28:33] = 0.9
    sharp, smooth = (
        measure(maps, mask, ("pointing_game", {"sigma_fraction": sigma, "tolerance": 2}))["pointing_game"].values.item()
        for sigma in (0, 0.05)
    )
    assert (sharp, smooth) == (0, 1)


def test_mass_and_rank_by_hand():
    maps = torch.tensor([[[4.0, -9.0, 1.0], [3.0, 2.0, 0.0]]])
    mask = torch.tensor([[[1, 1, 0], [0, 1, 0]]])
    scores = measure(maps, mask, "relevance_mass", "relevance_rank")
    assert scores["relevance_mass"].values.item() == pytest.approx(6 / 10)
    assert scores["relevance_rank"].values.item() == pytest.approx(2 / 3)  # 4 and 2 of 4, 3, 2
    negative = measure(-maps.abs(), mask, "relevance_mass", "grid_pointing_game")
    assert [score.values.item() for score in negative.values()] == [0, 0]
    flat = measure(torch.ones(1, 2, 3), mask, "relevance_rank")["relevance_rank"].values
    assert flat.item() == pytest.approx(3 / 6)  # any three pixels: half of them on the object


@pytest.mark.parametrize("grid", [2, 3])
def test_grid_closed_forms(grid):
    cells = grid_cells(grid, 13, 12)
    assert torch.equal(cells.sum(0), torch.ones(13, 12, dtype=torch.int64))  # each pixel is in one cell
    uniform = torch.ones(1, 13, 12)
    inside = cells[1:2].float() - 0.5  # negative elsewhere
    sides = torch.ones(1, 12, 12)
    for maps, mask, value in (
        (inside, cells[1:2], 1),
        (inside, cells[:1], 0),
        (sides, grid_cells(grid, 12, 12)[:1], 1 / grid**2),
    ):
        score = measure(maps, mask, "grid_pointing_game")["grid_pointing_game"]
        assert score.values.item() == pytest.approx(value)
    assert measure(uniform, cells[:1], "grid_pointing_game")["grid_pointing_game"].values.item() == pytest.approx(
        cells[0].float().mean().item()
    )


# ------------------------------------------------------------------------------------------------------------- mosaics


class Brightness(nn.Module):
    """The class is the image's mean, in tenths; certain, unless the mean lies between two."""

    def forward(self, x: Tensor) -> Tensor:
        return -400 * (x.mean((1, 2, 3))[:, None] - torch.arange(10) / 10).abs()


def plain_images(*means: float) -> Tensor:
    return torch.tensor(means).view(-1, 1, 1, 1).expand(-1, 1, 6, 4).contiguous()


def test_mosaics_show_confident_images_of_different_classes():
    means = [0.1, 0.2, 0.3, 0.4, 0.2, 0.1, 0.449, 0.7]
    x, labels = plain_images(*means), torch.tensor([1, 2, 3, 4, 2, 1, 4, 6])  # the last two are not sure, or wrong
    built = mosaics(Brightness().eval(), x, labels, grid=2, n_samples=20, seed=3)
    assert built.images.shape == (80, 1, 12, 8)
    assert built.masks.shape == (80, 12, 8)
    for index in range(80):
        shown = built.images[index, 0][built.masks[index]]
        assert torch.allclose(shown, built.targets[index] / 10)
        four = built.targets[index // 4 * 4 : index // 4 * 4 + 4]
        assert len(set(four.tolist())) == 4
    assert set(built.sources.flatten().tolist()) == {0, 1, 2, 3, 4, 5}
    again, other = (mosaics(Brightness().eval(), x, labels, grid=2, n_samples=20, seed=s) for s in (3, 4))
    assert torch.equal(again.images, built.images)
    assert not torch.equal(other.images, built.images)
    five = plain_images(*means[:4], 0.5, 0.6)  # more classes than cells
    many = mosaics(Brightness().eval(), five, torch.arange(1, 7), grid=2, n_samples=30)
    assert many.sources.shape == (30, 4)
    assert set(many.sources.flatten().tolist()) == set(range(6))
    small = mosaics(Brightness().eval(), x, labels, grid=2, n_samples=2, shrink=True)
    assert small.images.shape == (8, 1, 6, 4)
    maps = built.masks.double() - 0.1
    scores = attrbox.evaluate(
        None, built.images.double(), {"m": maps}, ["grid_pointing_game"], masks=built.masks, target=built.targets
    )
    assert scores["m"]["grid_pointing_game"].mean == 1
    assert scores["random"]["grid_pointing_game"].mean == pytest.approx(0.25, abs=0.05)


def test_mosaics_need_enough_classes():
    x, labels = plain_images(0.1, 0.2, 0.3, 0.3), torch.tensor([1, 2, 3, 3])
    with pytest.raises(InputError, match=r"needs confident images of 4 classes, got 4 images of 3"):
        mosaics(Brightness().eval(), x, labels, grid=2)
    with pytest.raises(InputError, match="one label each"):
        mosaics(Brightness().eval(), x, labels[:3])
    for options, message in (
        ({"grid": 1}, "2 x 2"),
        ({"grid": 2.5}, "grid"),
        ({"n_samples": 0}, "n_samples"),
        ({"confidence": 2}, "confidence"),
    ):
        with pytest.raises(OptionError, match=message):
            mosaics(Brightness().eval(), x, labels, **options)


def test_mosaics_leave_the_model_alone():
    model, x = squeeze_excitation_net(), images(4, 3, 8, 8)
    with nothing_changes(model, x), pytest.raises(InputError):
        mosaics(model, x, [0, 1, 2, 3], confidence=1.0)


# --------------------------------------------------------------------------------------------------------- annotations


def voc(*objects: tuple[str, tuple[int, ...], int], size: tuple[int, int] = (10, 20)) -> dict:
    """As torchvision reads it from the XML: everything is text."""
    return {
        "annotation": {
            "size": {"height": str(size[0]), "width": str(size[1]), "depth": "3"},
            "object": [
                {
                    "name": name,
                    "difficult": str(difficult),
                    "bndbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), map(str, box), strict=True)),
                }
                for name, box, difficult in objects
            ],
        }
    }


def test_voc_boxes_count_from_one_and_include_their_ends():
    objects = voc_objects(voc(("cat", (1, 1, 2, 3), 0), ("cat", (20, 10, 20, 10), 1), ("dog", (3, 3, 20, 10), 0)))
    wanted = torch.zeros(10, 20, dtype=torch.bool)
    wanted[:3, :2] = True
    wanted[9, 19] = True
    assert torch.equal(objects["cat"].mask, wanted)
    assert objects["cat"].difficult  # small, and beside a dog
    assert not objects["dog"].difficult


def test_voc_classes_of_difficult_objects_only_are_skipped():
    objects = voc_objects(voc(("cat", (1, 1, 2, 3), 1), ("dog", (1, 1, 2, 3), 0)))
    assert set(objects) == {"dog"}
    alone = voc_objects(voc(("dog", (1, 1, 2, 3), 0)))["dog"]
    assert not alone.difficult  # nothing distracts
    with pytest.raises(InputError, match="VOCDetection"):
        voc_objects({"annotation": {"object": []}})


def test_coco_boxes_outlines_and_crowds():
    square = {"category_id": 17, "bbox": [2, 1, 3, 2], "segmentation": [[2, 1, 5, 1, 5, 3, 2, 3]], "iscrowd": 0}
    triangle = {"category_id": 17, "bbox": [10, 0, 6, 6], "segmentation": [[10, 0, 16, 0, 10, 6]], "iscrowd": 0}
    crowd = {"category_id": 18, "bbox": [0, 0, 20, 10], "segmentation": {"counts": [200]}, "iscrowd": 1}
    wanted = torch.zeros(10, 20, dtype=torch.bool)
    wanted[1:3, 2:5] = True
    assert torch.equal(coco_objects([square, crowd], 10, 20)[17].mask, wanted)
    assert torch.equal(coco_objects([square], 10, 20, boxes=True)[17].mask, wanted)
    both = coco_objects([square, triangle], 10, 20)
    assert set(both) == {17}
    assert both[17].mask[0, 10]
    assert not both[17].mask[5, 15]
    assert 15 <= both[17].mask[:, 9:].sum() <= 21  # half of 36, with or without the pixels that the edge halves
    with pytest.raises(InputError, match="CocoDetection"):
        coco_objects([{"bbox": [1, 2, 3]}], 10, 20)


def test_boxes_cover_the_pixels_whose_centres_they_hold():
    assert box_mask([(0, 0, 20, 10)], 10, 20).all()
    assert box_mask([(0.4, 0.4, 1.4, 1.6)], 4, 4).nonzero().tolist() == [[0, 0], [1, 0]]
    with pytest.raises(InputError, match="left, top, right, bottom"):
        box_mask([(3, 0, 1, 2)], 4, 4)


def test_each_image_once_for_each_class_that_the_model_knows():
    objects = [
        voc_objects(voc(("cat", (1, 1, 2, 3), 0), ("dog", (3, 3, 20, 10), 0))),
        voc_objects(voc(("bird", (1, 1, 2, 3), 0), size=(5, 6))),
        voc_objects(voc(("dog", (1, 1, 6, 5), 0), size=(5, 6))),
    ]
    pairs = object_pairs(objects, {"cat": 281, "dog": 207})
    assert pairs.rows.tolist() == [0, 0, 2]
    assert pairs.targets.tolist() == [281, 207, 207]
    assert [tuple(mask.shape) for mask in pairs.masks] == [(10, 20), (10, 20), (5, 6)]
    assert pairs.difficult.tolist() == [True, False, False]
    with pytest.raises(InputError, match="got none"):
        object_pairs(objects, {"horse": 3})
    scores = attrbox.evaluate(
        None, torch.zeros(3, 3, 8, 8), {"m": torch.ones(3, 8, 8)}, ["pointing_game"], masks=pairs.masks,
        target=pairs.targets,
    )  # fmt: skip
    assert scores["m"]["pointing_game"].groups.tolist() == [281, 207, 207]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(3, 8, 8), "one object mask for each of the 2"),
        (torch.zeros(2, 1, 8, 8), r"\[h, w\]"),
        ([torch.zeros(8, 8), None], "image 1"),
        (None, "needs the objects"),
    ],
)
def test_masks_that_do_not_fit(masks, message):
    with pytest.raises(InputError, match=message):
        measure(torch.ones(2, 8, 8), masks, "pointing_game")


def test_options_out_of_range():
    for options in ({"tolerance": 0}, {"sigma_fraction": 1}, {"per_class": 2}):
        with pytest.raises(OptionError, match=next(iter(options))):
            measure(torch.ones(2, 8, 8), torch.ones(2, 8, 8), ("pointing_game", options))
    with pytest.raises(InputError, match=r"images \[N, C, H, W\]"):
        attrbox.evaluate(None, images(2, 7), {"m": images(2, 7)}, ["pointing_game"], masks=torch.ones(2, 8, 8))

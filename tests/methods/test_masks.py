"""Mask and sMask: closed forms, the parts that masks are made of against slow formulas, stops and failures."""

import itertools
import math

import numpy as np
import pytest
import torch
from nets import images, relu_net, residual_net
from snapshots import nothing_changes
from torch import Tensor, nn

import attrbox
from attrbox.core.fills import Pyramid, fill_images, gaussian_blur
from attrbox.errors import InputError, OptimisationWarning, OptionError
from attrbox.methods.masking.generators import (
    SmoothMax,
    area_loss,
    circles,
    masks,
    smoothing,
    stretched,
    total_variation,
    upsampling,
)
from attrbox.methods.masking.meaningful_perturbation import RADII, _shifted


class Linear(nn.Module):
    """Two scores: the sum of the image times a template, and 0."""

    def __init__(self, template: Tensor) -> None:
        super().__init__()
        self.template = nn.Parameter(template, requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.template).sum((1, 2, 3))
        return torch.stack([score, 0 * score], 1)


def explain(model: nn.Module, x: Tensor, method: str, **options: object) -> attrbox.Attribution:
    return attrbox.explain(model, x, method, **({"target": 0, "progress": False} | options))


# One parameter per pixel, nothing smoothed, nothing moved: what remains is the game and the size.
BARE = {"step": 1, "smooth": 0.0, "tv": 0.0, "jitter": 0, "fill": 0.0, "score": "logit", "l1": 0.5, "iterations": 60}
THREE = Linear(torch.tensor([1.0, 0.2, -3.0]).double().view(1, 1, 1, 3))
ONES = torch.ones(1, 1, 1, 3).double()


class TestMask:
    @pytest.mark.parametrize("initial", ["ones", "random"])
    def test_only_contributions_beyond_the_weight_are_deleted(self, initial):
        """m_i = 0 just where w_i x_i > l1: contributions 1, 0.2 and -3, l1 0.5."""
        maps = explain(THREE, ONES, "mask", **BARE, initial=initial)
        torch.testing.assert_close(maps.values.flatten().tolist(), [1.0, 0.0, 0.0])
        torch.testing.assert_close(maps.details["loss"][0, -1].item(), 0.5 + 0.2 - 3)
        torch.testing.assert_close(maps.details["reward"][0, -1].item(), -(0.2 - 3))

    def test_the_preserve_game_keeps_them(self):
        maps = explain(THREE, ONES, "mask", **BARE, initial="random", game="preserve")
        torch.testing.assert_close(maps.values.flatten().tolist(), [1.0, 0.0, 0.0])
        torch.testing.assert_close(maps.details["loss"][0, -1].item(), 0.5 - 1)

    def test_size_as_a_mean_is_a_third_of_the_sum(self):
        for l1, wanted in ((1.0, [1.0, 0.0, 0.0]), (4.0, [0.0, 0.0, 0.0])):  # 1/3 and 4/3 a pixel
            options = BARE | {"l1": l1, "mean": True, "initial": "random"}
            assert explain(THREE, ONES, "mask", **options).values.flatten().tolist() == wanted

    def test_presets(self):
        spec = attrbox.method_registry["mask"]
        authors, port = spec.create({}), spec.create({"preset": "port", "lr": 0.2})
        assert (authors.iterations, authors.l1, authors.tv, authors.jitter, authors.noise) == (300, 1e-4, 1e-2, 4, 0.0)
        assert (authors.fill, authors.blur, authors.initial, authors.mean) == ("blur", 10.0, "circle", False)
        assert (port.iterations, port.l1, port.tv, port.jitter, port.noise) == (500, 0.01, 0.2, 0, 0.2)
        assert (port.fill, port.initial, port.mean, port.isotropic, port.lr) == ("median", "ones", True, False, 0.2)
        assert spec.create({"preset": "port", "noise": 0.0}).noise == 0
        with pytest.raises(OptionError, match="preset"):
            spec.create({"preset": "best"})
        x = images(2, 3, 16, 16)
        default, other = (explain(residual_net(), x, "mask", preset=p, iterations=3) for p in ("authors", "port"))
        assert default.options["preset"] == "authors"
        assert (default.details["loss"] - other.details["loss"]).abs().max() > 0.01

    def test_the_circle_that_it_starts_from(self):
        template = torch.zeros(1, 1, 48, 48, dtype=torch.float64)
        template[..., 20:28, 20:28] = 1  # a disc of some radius hides 99 % of it
        model, x = Linear(template), torch.ones(2, 1, 48, 48, dtype=torch.float64)
        options = {"fill": 0.0, "score": "logit", "iterations": 1, "lr": 1e-9, "history": 1, "jitter": 0}
        start = explain(model, x, "mask", **options).details["history"]
        assert start.shape == (2, 1, 6, 6)
        discs = 1 - circles(RADII, 10.0, (48, 48), x)
        scores = (discs * template[0]).sum((1, 2))
        chosen = next(i for i, s in enumerate(scores) if (s - scores[-1]) / (64 - scores[-1]) < 0.01)
        assert 0 < chosen < len(RADII) - 1
        torch.testing.assert_close(start[0, 0], discs[chosen][::8, ::8], atol=1e-8, rtol=0)
        assert (start[1] == start[0]).all()

    def test_discs(self):
        from scipy.ndimage import gaussian_filter

        y, x = np.ogrid[-8:9, -10:11]
        wanted = gaussian_filter((x**2 + y**2 <= 25).astype(float), 2.0, mode="nearest")
        found = circles([5], 2.0, (17, 21), torch.zeros(1, dtype=torch.float64))[0]
        torch.testing.assert_close(found, torch.from_numpy(wanted))

    def test_the_image_moves_under_the_mask(self):
        x = images(2, 3, 9, 7)
        shifts = torch.tensor([[2, 2], [0, 3]])
        moved = _shifted(x, shifts, 4)
        assert torch.equal(moved[0], x[0])
        rows, columns = torch.arange(9) - 2, torch.arange(7) + 1
        assert torch.equal(moved[1], x[1][:, rows.clamp(0)][:, :, columns.clamp(max=6)])
        still, moving = (explain(residual_net(), x, "mask", jitter=j, step=3, iterations=4) for j in (0, 4))
        assert (still.details["loss"] - moving.details["loss"]).abs().max() > 1e-4

    def test_fills_and_noise_change_the_mask(self):
        model, x = residual_net(), images(2, 3, 8, 8)
        options = {"step": 2, "iterations": 3, "jitter": 0, "initial": "random", "smooth": 1.0}

        def loss(**changed: object) -> Tensor:
            return explain(model, x, "mask", **(options | changed)).details["loss"]

        losses = [loss(fill=f) for f in ("blur", "median", "mean", "noise", 0.0)]
        losses += [loss(noise=0.3), loss(blur=3.0), loss(smooth=0.0), loss(upsample="linear"), loss(initial="ones")]
        losses += [loss(tv=0.1), loss(l1=0.01), loss(mean=True), loss(isotropic=False), loss(beta=2.0)]
        for one, other in itertools.combinations(losses, 2):
            assert (one - other).abs().max() > 1e-6
        assert torch.equal(loss(fill="noise"), losses[3])
        assert not torch.equal(loss(fill="noise", seed=1), losses[3])

    def test_published_score_is_the_probability(self):
        model, x = residual_net(), images(2, 3, 8, 8)
        few = {"step": 2, "iterations": 3, "initial": "ones"}
        loss = explain(model, x, "mask", **few).details["loss"]
        assert torch.equal(loss, explain(model, x, "mask", score="prob", **few).details["loss"])
        assert not torch.equal(loss, explain(model, x, "mask", score="logit", **few).details["loss"])


class TestParts:
    def test_the_longer_side_is_one_of_the_image(self):
        """However many images and channels there are."""
        x = images(30, 20, 6, 4)
        torch.testing.assert_close(fill_images(x, "blur", lambda: x), gaussian_blur(x, 0.3))
        maps = images(30, 6, 4)
        smoothed = masks["gaussian"].make(sigma_fraction=0.1).smoothed(maps)
        torch.testing.assert_close(smoothed, gaussian_blur(maps, 0.6))
        assert masks["gaussian"].make(sigma_fraction=0.0).smoothed(maps) is maps

    def test_total_variation(self):
        m = images(2, 4, 5).abs()
        expected = torch.zeros(2, dtype=torch.float64)
        apart = torch.zeros(2, dtype=torch.float64)
        for i, j in itertools.product(range(4), range(5)):
            down = m[:, i + 1, j] - m[:, i, j] if i < 3 else torch.zeros(2)
            right = m[:, i, j + 1] - m[:, i, j] if j < 4 else torch.zeros(2)
            expected += (down**2 + right**2) ** 1.5
            apart += down.abs() ** 3 / 15 + right.abs() ** 3 / 16
        torch.testing.assert_close(total_variation(m, 3.0, True, False), expected)
        torch.testing.assert_close(total_variation(m, 3.0, True, True), expected / 20)
        torch.testing.assert_close(total_variation(m, 3.0, False, True), apart)
        flat = torch.ones(1, 3, 3, dtype=torch.float64, requires_grad=True)
        for isotropic in (True, False):
            (gradient,) = torch.autograd.grad(total_variation(flat, 3.0, isotropic, False).sum(), flat)
            assert (gradient == 0).all()
        assert total_variation(m[:, :1, :1], 3.0, False, True).tolist() == [0, 0]

    def test_matrices_stretch_as_interpolation_and_blur_do(self):
        grid, like = images(2, 3, 4), torch.zeros(1, dtype=torch.float64)
        for mode, name, aligned in (
            ("nearest", "nearest", None),
            ("linear", "bilinear", False),
            ("corners", "bilinear", True),
        ):
            wanted = nn.functional.interpolate(grid[None], (14, 9), mode=name, align_corners=aligned)[0]
            found = stretched(grid, [upsampling(3, 14, mode, like), upsampling(4, 9, mode, like)])
            torch.testing.assert_close(found, wanted)
        matrices = [smoothing(14, 1.5, like), smoothing(9, 1.5, like)]
        torch.testing.assert_close(stretched(wanted, matrices), gaussian_blur(wanted, 1.5))
        several = [torch.stack([m, 2 * m]) for m in matrices]  # one matrix for each of the two
        torch.testing.assert_close(stretched(wanted, several)[1], 4 * gaussian_blur(wanted[1], 1.5))

    def test_pyramid(self):
        x = images(2, 3, 12, 10)
        for kind in ("blur", "fade"):
            pyramid = Pyramid.of(x, kind, 8, 2.0)
            full, none = torch.ones(2, 1, 12, 10).double(), torch.zeros(2, 1, 12, 10).double()
            torch.testing.assert_close(pyramid.at(full)[0][:, 0], x)
            most = gaussian_blur(x, 2.0, "zero") if kind == "blur" else 0 * x
            torch.testing.assert_close(pyramid.at(none)[0][:, 0], most)
            masks = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            shown, slope = pyramid.at(masks)
            torch.testing.assert_close(pyramid.at(masks + 1e-7)[0] - shown, 1e-7 * slope, atol=1e-12, rtol=1e-4)
            if kind == "fade":
                torch.testing.assert_close(shown, masks.unsqueeze(2) * x.unsqueeze(1))
        level = gaussian_blur(x, 2.0 * (1 - 3 / 7), "zero")
        torch.testing.assert_close(Pyramid.of(x, "blur", 8, 2.0).at(full * 3 / 7)[0][:, 0], level)

    def test_area_loss(self):
        wanted = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 1, 1, 1]).double()
        shuffled = wanted[torch.randperm(10, generator=torch.Generator().manual_seed(0))]
        torch.testing.assert_close(area_loss(shuffled.view(1, 2, 5), [0.3]).item(), 0.0)
        for wrong in (shuffled * 0.9, 1 - shuffled, shuffled.clone().index_fill_(0, torch.tensor([0, 1, 2]), 0.5)):
            assert area_loss(wrong.view(1, 2, 5), [0.3]).item() > 1e-3
        masks = torch.rand(6, 20, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        areas = (0.05, 0.9)  # in turns
        reference = torch.stack([(torch.arange(600) >= round(600 * (1 - a))).double() for a in areas * 3])
        by_sorting = ((masks.flatten(1).sort(1).values - reference) ** 2).mean(1)
        found = area_loss(masks, areas)
        torch.testing.assert_close(found, by_sorting, atol=1e-6, rtol=1e-4)
        gradients = [torch.autograd.grad(loss.sum(), masks, retain_graph=True)[0] for loss in (found, by_sorting)]
        differing = (gradients[0] - gradients[1]).abs() > 1e-9
        assert differing.sum() <= 6  # but for values nearly equal to the threshold

    def test_equal_pixels_share_the_area(self):
        plateau = torch.full((1, 10), 0.6, dtype=torch.float64)
        plateau[0, 0] = 0.1
        plateau.requires_grad_()
        loss = area_loss(plateau, [0.3])
        torch.testing.assert_close(loss.item(), (0.1**2 + 6 * 0.6**2 + 3 * 0.4**2) / 10)  # as if sorted
        (gradient,) = torch.autograd.grad(loss.sum(), plateau)
        torch.testing.assert_close(gradient[0, 1:], torch.full((9,), 0.2 * (0.6 - 3 / 9)).double())
        rough = plateau.detach() + 1e-6 * images(1, 10)  # the same within rounding
        rough.requires_grad_()
        (again,) = torch.autograd.grad(area_loss(rough, [0.3]).sum(), rough)
        torch.testing.assert_close(again, gradient, atol=1e-5, rtol=0)

    def test_smooth_maximum_of_bumps(self):
        generator = SmoothMax((56, 56), 7, 21.0, torch.zeros(1, dtype=torch.float64))
        assert generator.grid == (8, 8)
        parameters = torch.zeros(3, 8, 8, dtype=torch.float64)
        parameters[1, 4, 4] = 1
        parameters[2] = 1
        whole = generator.whole(parameters)
        assert whole.shape == (3, 92, 92)
        assert whole[0].abs().max() == 0
        assert abs(whole[1].max() - 1) < 1e-4
        assert 0.985 < whole[2].max() < 1
        assert abs(whole[2, 46, 46] - 0.985) < 1e-2
        cropped = generator.cropped(whole)
        assert cropped.shape == (3, 56, 56)
        assert cropped[1, 28, 28] > 0.999  # grid point 4 is pixel 28
        assert cropped[1, 28, 0] < 0.5

    @pytest.mark.parametrize(("shape", "step", "sigma"), [((20, 13), 4, 6.0), ((8, 8), 7, 21.0), ((9, 10), 1, 1.5)])
    def test_smooth_maximum_point_by_point(self, shape, step, sigma):
        generator = SmoothMax(shape, step, sigma, torch.zeros(1, dtype=torch.float64))
        p = torch.rand(2, *generator.grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = generator.cropped(generator.whole(p))
        assert found.shape == (2, *shape)
        around = math.ceil(sigma / step)
        for y, x in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2), (0, shape[1] - 1), (3, 5)]:
            bumps = []
            cell_y, cell_x = ((place + generator.margin) // step - around for place in (y, x))
            for i, j in itertools.product(range(-around - 1, around + 2), repeat=2):
                gy, gx = cell_y + i, cell_x + j
                inside = 0 <= gy < p.shape[1] and 0 <= gx < p.shape[2]
                # Whole pixels of the margin, but distances from the exact one.
                offset = generator.margin - sigma
                distance = math.hypot(y + offset - step * gy, x + offset - step * gx)
                height = math.exp(-2 * max(distance / sigma - 0.5, 0) ** 2)
                bumps.append(height * p[:, gy, gx] if inside else torch.zeros(2).double())
            u = torch.stack(bumps)
            wanted = (u * (20 * u).softmax(0)).sum(0)
            torch.testing.assert_close(found[:, y, x], wanted)

    def test_smooth_maximum_has_its_derivative(self):
        generator = SmoothMax((4, 3), 3, 3.0, torch.zeros(1, dtype=torch.float64))
        p = torch.rand(2, *generator.grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.autograd.gradcheck(generator.whole, p.requires_grad_())


BRIGHT = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
BRIGHT[..., 6:18, 14:26] = 1 / 144  # 14 % of the image
SMALL = {"step": 4, "sigma": 4.0, "perturbation": "fade", "levels": 8, "jitter": False}


class TestSMask:
    def test_covers_the_area_on_the_object(self):
        x = torch.full((1, 1, 32, 32), 20.0, dtype=torch.float64)
        areas = (0.05, 0.2)
        maps = explain(Linear(BRIGHT), x, "smask", area_fractions=areas, iterations=500, **SMALL)
        masks = maps.details["masks"][0, :, 0]
        assert (maps.details["areas"][0] - torch.tensor(areas)).abs().max() < 0.02
        on = (masks * (BRIGHT[0] > 0)).sum((1, 2)) / masks.sum((1, 2))
        assert on[0] > 0.85  # smaller than the object: all on it
        covered = (masks[1] * BRIGHT[0, 0]).sum()
        assert covered > 0.8  # larger: nearly all of it, as edges are soft
        torch.testing.assert_close(maps.values[0, 0], masks.sum(0))
        # What the details say of the final masks is so.
        shown = (masks * x[0] * BRIGHT[0]).sum((1, 2))
        torch.testing.assert_close(maps.details["area_rewards"][0], shown)
        best = explain(
            Linear(BRIGHT), x, "smask", area_fractions=areas, iterations=5, combine="best", slack_fraction=0.3, **SMALL
        )
        chosen = int(best.details["best"])
        torch.testing.assert_close(best.values, best.details["masks"][:, chosen])
        assert (best.details["masks"][:, 1 - chosen] - best.values).abs().max() > 1e-6

    def test_the_three_games_agree_on_a_linear_model(self):
        """f(m X) and -f((1 - m) X) differ by a constant there, and dual is their sum."""
        x = 1 + images(2, 1, 16, 16).abs()
        model = Linear(images(1, 1, 16, 16, seed=3))
        options = SMALL | {"area_fractions": (0.3,), "iterations": 12}
        found = {v: explain(model, x, "smask", variant=v, **options) for v in ("preserve", "delete", "dual")}
        torch.testing.assert_close(found["preserve"].values, found["delete"].values)
        rewards = {name: maps.details["reward"] for name, maps in found.items()}
        torch.testing.assert_close(
            rewards["preserve"] - rewards["delete"], found["dual"].score[:, None, None].expand(2, 1, 12)
        )
        twice = explain(Linear(2 * model.template), x, "smask", **options)
        torch.testing.assert_close(found["dual"].values, twice.values)
        assert (found["dual"].values - found["preserve"].values).abs().max() > 1e-3

    def test_a_step_of_the_optimiser(self):
        """One step of gradient ascent by hand; momentum begins with the plain gradient."""
        x, model = images(1, 1, 8, 8).abs(), Linear(images(1, 1, 8, 8, seed=3))
        options = {
            "step": 4,
            "sigma": 4.0,
            "perturbation": "fade",
            "jitter": True,
            "area_fractions": (0.25,),
            "lr": 0.001,
        }
        maps = explain(model, x, "smask", iterations=3, history=3, **options)
        generator = SmoothMax((8, 8), 4, 4.0, x)
        p, velocity = torch.ones(1, 2, 2, dtype=torch.float64), None
        for step in range(3):
            p.requires_grad_()
            whole = generator.whole(p)
            shown = generator.cropped(whole) * x[:, 0]
            reward = model((shown.flip(-1) if step % 2 == 0 else shown)[:, None])[:, 0]
            loss = 300 * 1.0035**step * area_loss(whole, [0.25]) - reward
            torch.testing.assert_close(maps.details["loss"][0, 0, step], loss[0].detach())
            (gradient,) = torch.autograd.grad(loss.sum(), p)
            velocity = gradient if velocity is None else 0.9 * velocity + 0.1 * gradient
            p = (p.detach() - 0.001 * velocity).clamp(0, 1)
            torch.testing.assert_close(maps.details["history"][0, 0, step], p[0])
        torch.testing.assert_close(maps.values[0], generator.cropped(generator.whole(p)))

    def test_the_best_area(self):
        method = attrbox.method_registry["smask"].create({"area_fractions": (0.2, 0.1, 0.4), "slack_fraction": 0.1})
        rewards = torch.tensor([[[9.5, 8.0, 9.9], [1.0, 2.0, 3.0], [9.2, 9.1, 9.0], [-10.0, -20.0, -8.0]]])
        scores = torch.tensor([[10.0, 10.0, 10.0, -9.5]])
        assert method.best(rewards, scores).tolist() == [[0, 2, 1, 0]]
        delete = attrbox.method_registry["smask"].create(
            {"area_fractions": (0.2, 0.1, 0.4), "slack_fraction": 0.1, "variant": "delete"}
        )
        assert delete.best(torch.tensor([[[-0.9, -2.0, -0.1]]]), torch.tensor([[10.0]])).tolist() == [[0]]

    def test_areas_do_not_depend_on_each_other(self):
        model, x = residual_net(), images(2, 3, 12, 12)
        options = {"step": 4, "sigma": 6.0, "iterations": 3}
        together = explain(model, x, "smask", area_fractions=(0.1, 0.5), **options).details["masks"]
        for index, area in enumerate((0.1, 0.5)):
            alone = explain(model, x, "smask", area_fractions=(area,), **options)
            torch.testing.assert_close(together[:, index], alone.values)
        assert torch.equal(explain(model, x, "smask", area_fractions=0.5, **options).values, alone.values)

    def test_options_that_must_matter(self):
        model, x = residual_net(), images(1, 3, 12, 12)
        base = {"step": 4, "sigma": 6.0, "iterations": 4, "area_fractions": (0.3,)}
        plain = explain(model, x, "smask", **base).values
        for option in (
            {"perturbation": "fade"}, {"levels": 3}, {"blur": 3.0}, {"jitter": False}, {"lr": 0.1}, {"momentum": 0.0},
            {"weight": 10.0}, {"growth": 1.5}, {"smooth_fraction": 0.1}, {"sigma": 8.0}, {"step": 3}, {"score": "prob"},
        ):  # fmt: skip
            assert (explain(model, x, "smask", **(base | option)).values - plain).abs().max() > 1e-7, option
        smoothed = explain(model, x, "smask", **base, smooth_fraction=0.1).values
        torch.testing.assert_close(smoothed, gaussian_blur(plain, 1.2, "zero"))


FEW = {"mask": {"step": 4, "initial": "ones", "score": "logit"}, "smask": {"step": 4, "sigma": 6.0}}


@pytest.mark.parametrize("method", FEW)
class TestBoth:
    def test_details(self, method):
        model, x = relu_net(), images(3, 3, 8, 8)
        maps = explain(
            model, x, method, iterations=5, history=3, target=attrbox.classes([0, 2]), batch_size=2, **FEW[method]
        )
        shape = (3, 2, 1) if method == "smask" else (3, 2)
        details = maps.details
        assert details["loss"].shape == details["reward"].shape == (*shape, 5)
        assert details["loss"].isfinite().all()
        assert (details["iterations"] == 5).all()
        assert details["iterations"].shape == shape
        assert not details["failed"].any()
        assert details["history"].shape == (*shape, 3, 2, 2)
        assert (details["history"].diff(dim=-3) != 0).any()
        assert maps.values.min() >= 0
        assert maps.values.max() <= 1
        assert explain(model, x, method, iterations=1, history=0, **FEW[method]).details["history"].shape[-1] == 0

    def test_the_loss_goes_down(self, method):
        still = {"weight": 30.0, "growth": 1.0} if method == "smask" else {"lr": 0.01, "initial": "random"}
        options = FEW[method] | still | {"jitter": 0 if method == "mask" else False}
        maps = explain(residual_net(), images(3, 3, 12, 12), method, iterations=25, **options)
        loss = maps.details["loss"].flatten(0, -2)
        assert (loss[:, -1] < loss[:, 0] - 1e-3).all()

    def test_time_is_up(self, method):
        model, x = relu_net(), images(2, 3, 8, 8)
        maps = explain(model, x, method, iterations=50, seconds=1e-9, history=4, **FEW[method])
        assert (maps.details["iterations"] == 1).all()
        assert maps.details["loss"][..., 0].isfinite().all()
        assert maps.details["loss"][..., 1:].isnan().all()
        assert maps.details["history"].shape[-3] == 4
        once = explain(model, x, method, iterations=1, **FEW[method])
        torch.testing.assert_close(maps.values, once.values)
        enough = explain(model, x, method, iterations=2, seconds=1e6, **FEW[method])
        assert (enough.details["iterations"] == 2).all()

    def test_a_loss_that_becomes_nan_stops_that_image_alone(self, method):
        class Fragile(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.calls = relu_net(), 0

            def forward(self, x: Tensor) -> Tensor:
                red = x[:, :1].amax((2, 3))
                return self.inner(x) + torch.where((red > 5) & (red < 25 - 1e-9), torch.nan, 0.0)

        x = images(3, 3, 8, 8)
        x[1, 0] += 25 - x[1, 0].amax()  # NaN as soon as its red is not shown as it is
        options = FEW[method] | ({"fill": "blur"} if method == "mask" else {})
        with nothing_changes(model := Fragile().eval(), x), pytest.warns(OptimisationWarning, match=r"images \[1\]"):
            maps = explain(model, x, method, iterations=4, history=1, seed=[4, 5, 6], **options)
        assert maps.details["failed"].flatten().tolist() == [False, True, False]
        first = {"mask": 1, "smask": 0}[method]  # mask begins with the image as it is
        assert maps.details["iterations"].flatten().tolist() == [4, first, 4]
        assert maps.details["history"][1].min() >= 0.9  # one step from the start at the most
        assert maps.values.isfinite().all()
        healthy = explain(model, x[[0, 2]], method, iterations=4, seed=[4, 6], **options)
        torch.testing.assert_close(maps.values[[0, 2]], healthy.values)

    def test_memory_runs_out(self, method):
        model, x = relu_net(), images(3, 3, 8, 8)

        class Small(nn.Module):
            def forward(self, batch: Tensor) -> Tensor:
                if len(batch) > 2 and not torch.equal(batch, x):
                    raise torch.OutOfMemoryError("too many")
                return model(batch)

        wanted = explain(model, x, method, iterations=2, **FEW[method]).values
        torch.testing.assert_close(explain(Small().eval(), x, method, iterations=2, **FEW[method]).values, wanted)

    @pytest.mark.parametrize(
        "options",
        [
            {"iterations": 0},
            {"iterations": 2.0},
            {"seconds": 0.0},
            {"seconds": "1"},
            {"history": -1},
            {"score": "loss"},
            {"step": 0},
            {"lr": 0.0},
            {"blur": 0.0},
        ],
    )
    def test_options_out_of_range(self, method, options):
        with pytest.raises(OptionError, match=next(iter(options))):
            explain(relu_net(), images(1, 3, 8, 8), method, **options)

    def test_a_mask_larger_than_the_image(self, method):
        model, x = relu_net(), images(2, 3, 8, 8)
        with nothing_changes(model, x), pytest.raises(InputError, match=r"step=9 .* larger than the images, 8 x 8"):
            explain(model, x, method, step=9)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *(
            ("smask", {"area_fractions": areas})
            for areas in (0.0, 1.0, (0.1, 1.5), (-0.1,), (), ("a",), 1, None, math.nan)
        ),
        ("smask", {"variant": "keep"}),
        ("smask", {"combine": "mean"}),
        ("smask", {"perturbation": "noise"}),
        ("smask", {"levels": 1}),
        ("smask", {"sigma": 0.0}),
        ("smask", {"momentum": 1.5}),
        ("smask", {"weight": -1.0}),
        ("smask", {"growth": 0.0}),
        ("smask", {"slack_fraction": -0.1}),
        ("smask", {"smooth_fraction": -1.0}),
        ("smask", {"jitter": 1}),
        ("mask", {"game": "dual"}),
        ("mask", {"upsample": "cubic"}),
        ("mask", {"initial": "zeros"}),
        ("mask", {"fill": "black"}),
        ("mask", {"fill": math.inf}),
        ("mask", {"beta": 0}),
        ("mask", {"l1": -1.0}),
        ("mask", {"tv": "big"}),
        ("mask", {"smooth": math.nan}),
        ("mask", {"noise": -0.1}),
        ("mask", {"jitter": -1}),
        ("mask", {"jitter": 1.5}),
        ("mask", {"mean": 1}),
        ("mask", {"isotropic": None}),
    ],
)
def test_options_out_of_range(method, options):
    with pytest.raises(OptionError, match=next(iter(options))):
        explain(relu_net(), images(1, 3, 8, 8), method, **options)


@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 16), (2, 2, 6, 6, 6)])
@pytest.mark.parametrize("method", FEW)
def test_only_images(method, shape):
    with pytest.raises(InputError, match=r"needs images \[N, C, H, W\]"):
        explain(Sum().eval(), images(*shape), method)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.flatten(1).sum(1), x.flatten(1).amax(1)], 1)

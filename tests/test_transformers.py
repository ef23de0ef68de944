"""Transformers: every method runs and keeps its promises on small ones of each of torchvision's kinds."""

import pytest
import torch
from nets import FAST, TRANSFORMERS, images
from snapshots import nothing_changes

import attrbox
from attrbox.errors import AttrboxError

METHODS = [name for name in attrbox.list_methods() if not attrbox.methods[name].required]
X = images(3, 3, 16, 16)
LEARNED = {"learned", "learned_rank", "learned_clean"}


@pytest.fixture(scope="module", params=TRANSFORMERS)
def named(request):
    return request.param, TRANSFORMERS[request.param]()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_or_says_why_not(named, method):
    name, model = named
    options = FAST.get(method, {}) | {"progress": False}
    if method in LEARNED and name in ("vit", "swin", "swin_v2"):  # they train rules between convolutions
        with pytest.raises(AttrboxError, match="between two convolutions"):
            attrbox.explain(model, X, method, **options)
        return
    with nothing_changes(model, X):
        maps = attrbox.explain(model, X, method, **options)
    assert maps.values.isfinite().all()
    assert maps.values.shape in ((3, 3, 16, 16), (3, 1, 16, 16))
    assert maps.coverage.complete
    if method not in LEARNED:  # batch mates
        alone = attrbox.explain(model, X[1:2], method, target=maps.target[1:2], **options).values
        torch.testing.assert_close(alone, maps.values[1:2])


@pytest.mark.parametrize("baseline", [0.0, images(3, 16, 16, seed=2), images(3, 3, 16, 16, seed=3)])
def test_deeplift_is_complete(named, baseline):
    maps = attrbox.explain(named[1], X, "deeplift", target=[1, 0, 3], baseline=baseline)
    assert maps.relative_gap.max() < 1e-10


def test_deeplift_on_black_and_other_constant_images(named):
    # At a constant image a norm's deviation is next to nothing: the multipliers must stay bounded.
    for value in (0.0, 1.0):
        maps = attrbox.explain(named[1], X, "deeplift", target=1, baseline=value)
        assert maps.values.abs().max() < 1e3 * maps.score.abs().max()


def test_several_targets_at_once(named):
    maps = attrbox.explain(named[1], X, "deeplift", target=attrbox.classes([3, 1]))
    torch.testing.assert_close(maps.values[:, 1], attrbox.explain(named[1], X, "deeplift", target=1).values)

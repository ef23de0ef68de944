"""All methods that run on any model, and how tests call them."""

from nets import FAST
from torch import Tensor, nn

import attrbox

# What needs an option (learned_transfer) or certain models (the rollouts) cannot run like this; see test_learned.py,
# test_transformers.py.
METHODS = [name for name in attrbox.list_methods() if attrbox.method_registry[name].for_all]


LEARNED = {"learned", "learned_rank", "learned_clean"}


CAM = {"grad_cam", "grad_cam_plus_plus", "layer_cam", "guided_grad_cam"}


COMPOSITES = {"lrp", "epsilon_plus", "epsilon_alpha2_beta1", "epsilon_gamma_box", "deep_taylor", "attn_lrp"}


OPTIMISED = {"mask", "smask"}


BLACK_BOX = {"occlusion", "rise", "lime", "kernel_shap"}


ONE_CHANNEL = CAM - {"guided_grad_cam"} | OPTIMISED | BLACK_BOX


DRAWN = {"random", "smoothgrad", "squared_smoothgrad", "vargrad", "rise", "lime", "kernel_shap", "mask"} | LEARNED


def explain(model: nn.Module, x: Tensor, method: str, **options: object) -> attrbox.Attribution:
    return attrbox.explain(model, x, method, **(FAST.get(method, {}) | {"progress": False} | options))

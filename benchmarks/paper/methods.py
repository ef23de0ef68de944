"""The methods that the paper compares, with its settings, and the presets of the learned rule."""

import argparse
from typing import Any

Chosen = dict[str, tuple[str, dict[str, Any]]]

LEARNED: Chosen = {name: (name, {"keep_rules": False}) for name in ("learned", "learned_rank", "learned_clean")}
GRADIENTS: Chosen = {
    "saliency": ("saliency", {}),
    "gradient_x_input": ("gradient_x_input", {}),
    "lrp_epsilon": ("lrp_epsilon", {}),
    "deeplift": ("deeplift", {}),
    "squared_smoothgrad": ("squared_smoothgrad", {"n_samples": 50}),
    "smoothgrad": ("smoothgrad", {"n_samples": 50}),
    "integrated_gradients": ("integrated_gradients", {"steps": 50}),
    "grad_cam": ("grad_cam", {}),
}


def masks(options: argparse.Namespace) -> Chosen:
    """Mask and sMask, which the paper runs on photographs alone."""
    wanted = {
        "mask": (options.mask_iterations, {"iterations": options.mask_iterations}),
        "smask": (options.smask_iterations, {"iterations": options.smask_iterations}),
    }
    return {name: (name, settings) for name, (iterations, settings) in wanted.items() if iterations}

"""attrbox: attribution maps for PyTorch image classifiers.

maps = attrbox.explain(model, images, "deeplift")
result = attrbox.compare(model, images, ["saliency", "lrp_epsilon", ("integrated_gradients", {"steps": 100})])
"""

from importlib.metadata import PackageNotFoundError, version

from attrbox import errors
from attrbox.compare import Comparison, compare, explain, list_methods
from attrbox.engine.site import Rule, Site
from attrbox.methods import (  # registers the methods
    cam,
    gradient,
    kernel_shap,
    learned,
    lime,
    mask,
    noise,
    occlusion,
    path,
    propagation,
    random,
    rise,
    smask,
)
from attrbox.methods.base import Method, methods, option, register_method
from attrbox.methods.propagation import register_rule, rules
from attrbox.methods.run import Run
from attrbox.shapes import Attribution, Coverage
from attrbox.targets import classes, top

try:
    __version__ = version("attrbox")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"

del cam, gradient, kernel_shap, learned, lime, mask, noise, occlusion, path, propagation, random, rise, smask
del version, PackageNotFoundError

__all__ = [
    "Attribution",
    "Comparison",
    "Coverage",
    "Method",
    "Rule",
    "Run",
    "Site",
    "classes",
    "compare",
    "errors",
    "explain",
    "list_methods",
    "methods",
    "option",
    "register_method",
    "register_rule",
    "rules",
    "top",
]

"""attrbox: attribution maps for PyTorch image classifiers.

maps = attrbox.explain(model, images, "deeplift")
result = attrbox.compare(model, images, ["saliency", "lrp_epsilon", ("integrated_gradients", {"steps": 100})])
"""

from importlib.metadata import PackageNotFoundError, version

from attrbox import errors
from attrbox.collect import merge, split, verify
from attrbox.compare import Comparison, compare, explain, list_methods
from attrbox.doctor import Diagnosis, doctor
from attrbox.engine.site import Rule, Site
from attrbox.evaluate import evaluate
from attrbox.export import export, recompute
from attrbox.fitting import fit_patterns
from attrbox.maps import MapsFile, open_maps
from attrbox.methods import (  # registers the methods
    cam,
    gradient,
    kernel_shap,
    learned,
    learned_transfer,
    lime,
    mask,
    noise,
    occlusion,
    path,
    patterns,
    propagation,
    random,
    relevance,
    rise,
    rollout,
    smask,
)
from attrbox.methods.base import Method, methods, option, register_method
from attrbox.methods.patterns import Patterns
from attrbox.methods.propagation import register_rule, rules
from attrbox.methods.run import Run
from attrbox.metrics import (  # registers the metrics
    axioms,
    complexity,
    curves,
    localization,
    road,
    robustness,
    sanity,
)
from attrbox.metrics.base import Measurement, Metric, list_metrics, metrics, register_metric
from attrbox.metrics.results import Evaluation
from attrbox.metrics.roar import Roar, roar
from attrbox.metrics.scores import Score
from attrbox.metrics.study import Study, Views
from attrbox.shapes import Attribution, Coverage
from attrbox.targets import classes, top

try:
    __version__ = version("attrbox")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"

del (
    cam,
    gradient,
    kernel_shap,
    learned,
    learned_transfer,
    lime,
    mask,
    noise,
    occlusion,
    path,
    patterns,
    propagation,
    random,
    relevance,
    rise,
    rollout,
    smask,
)
del version, PackageNotFoundError
del axioms, complexity, curves, localization, road, robustness, sanity

__all__ = [
    "Attribution",
    "Comparison",
    "Coverage",
    "Diagnosis",
    "Evaluation",
    "MapsFile",
    "Measurement",
    "Method",
    "Metric",
    "Patterns",
    "Roar",
    "Rule",
    "Run",
    "Score",
    "Site",
    "Study",
    "Views",
    "classes",
    "compare",
    "doctor",
    "errors",
    "evaluate",
    "explain",
    "export",
    "fit_patterns",
    "list_methods",
    "list_metrics",
    "merge",
    "methods",
    "metrics",
    "open_maps",
    "option",
    "recompute",
    "register_method",
    "register_metric",
    "register_rule",
    "roar",
    "rules",
    "split",
    "top",
    "verify",
]

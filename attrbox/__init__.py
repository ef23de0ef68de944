"""attrbox: attribution maps for PyTorch image classifiers.

maps = attrbox.explain(model, images, "deeplift")
result = attrbox.compare(model, images, ["saliency", "lrp_epsilon", ("integrated_gradients", {"steps": 100})])

The public names are imported when they are first used, so that `import attrbox` is quick.
"""

import importlib
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError, version as _version
from typing import TYPE_CHECKING, Any

from attrbox import errors

if TYPE_CHECKING:
    from attrbox.core.options import option as option
    from attrbox.core.results import Attribution as Attribution, Coverage as Coverage
    from attrbox.core.targets import classes as classes, top as top
    from attrbox.data.loading import Images as Images, load_images as load_images
    from attrbox.data.maps.merge import merge as merge, split as split, verify as verify
    from attrbox.data.maps.reader import MapsFile as MapsFile, open_maps as open_maps
    from attrbox.data.models.loaded_model import LoadedModel as LoadedModel, Preprocess as Preprocess
    from attrbox.data.models.loading import load_model as load_model
    from attrbox.engine.site import Rule as Rule, Site as Site
    from attrbox.methods.base import (
        Method as Method,
        method_registry as method_registry,
        register_method as register_method,
    )
    from attrbox.methods.comparison import Comparison as Comparison
    from attrbox.methods.context.run import Run as Run
    from attrbox.methods.describing import (
        Description as Description,
        describe as describe,
        list_methods as list_methods,
    )
    from attrbox.methods.diagnosis import Diagnosis as Diagnosis, doctor as doctor
    from attrbox.methods.explaining import compare as compare, explain as explain
    from attrbox.methods.propagation.pattern_attribution import Patterns as Patterns
    from attrbox.methods.propagation.pattern_fitting import fit_patterns as fit_patterns
    from attrbox.methods.propagation.rule_methods import register_rule as register_rule, rule_registry as rule_registry
    from attrbox.metrics.base import (
        Measurement as Measurement,
        Metric as Metric,
        list_metrics as list_metrics,
        metric_registry as metric_registry,
        register_metric as register_metric,
    )
    from attrbox.metrics.context import Study as Study
    from attrbox.metrics.evaluation import evaluate as evaluate
    from attrbox.metrics.faithfulness.roar import Roar as Roar, roar as roar
    from attrbox.metrics.records import Views as Views
    from attrbox.metrics.results import Evaluation as Evaluation
    from attrbox.metrics.scores import Score as Score
    from attrbox.pipeline.export import export as export
    from attrbox.pipeline.recompute import recompute as recompute
    from attrbox.pipeline.settings import Loading as Loading, Running as Running, Storage as Storage

try:
    __version__ = _version("attrbox")
except _PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"

# Where each public name is.
_PLACES = {
    "attrbox.pipeline.recompute": "recompute",
    "attrbox.metrics.records": "Views",
    "attrbox.methods.explaining": "explain compare",
    "attrbox.core.options": "option",
    "attrbox.core.results": "Attribution Coverage",
    "attrbox.core.targets": "classes top",
    "attrbox.data.loading": "Images load_images",
    "attrbox.data.models.loaded_model": "LoadedModel Preprocess",
    "attrbox.data.models.loading": "load_model",
    "attrbox.data.maps.merge": "merge split verify",
    "attrbox.data.maps.reader": "MapsFile open_maps",
    "attrbox.engine.site": "Rule Site",
    "attrbox.methods.base": "Method method_registry register_method",
    "attrbox.methods.comparison": "Comparison",
    "attrbox.methods.context.run": "Run",
    "attrbox.methods.describing": "Description describe list_methods",
    "attrbox.methods.diagnosis": "Diagnosis doctor",
    "attrbox.methods.propagation.pattern_attribution": "Patterns",
    "attrbox.methods.propagation.pattern_fitting": "fit_patterns",
    "attrbox.methods.propagation.rule_methods": "register_rule rule_registry",
    "attrbox.metrics.base": "Measurement Metric list_metrics metric_registry register_metric",
    "attrbox.metrics.context": "Study",
    "attrbox.metrics.evaluation": "evaluate",
    "attrbox.metrics.faithfulness.roar": "Roar roar",
    "attrbox.metrics.results": "Evaluation",
    "attrbox.metrics.scores": "Score",
    "attrbox.pipeline.export": "export",
    "attrbox.pipeline.settings": "Loading Running Storage",
}
_HOME = {name: place for place, names in _PLACES.items() for name in names.split()}

__all__ = [*sorted(_HOME), "errors"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

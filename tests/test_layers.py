"""Imports inside attrbox point down only, and they are absolute."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "attrbox"

# From the bottom to the top: a module imports from lines above its own only. A package stands for its modules.
LAYERS = [
    ["attrbox.errors"],
    ["attrbox.core.dense_tensors"],
    [
        "attrbox.core.atomic_files",
        "attrbox.core.half_precision",
        "attrbox.core.hashing",
        "attrbox.core.progress",
        "attrbox.core.registry",
        "attrbox.core.results",
    ],
    ["attrbox.data.maps.journal", "attrbox.data.labels", "attrbox.core.tensor_files"],
    ["attrbox.core.model_state", "attrbox.core.memory", "attrbox.core.outputs", "attrbox.core.fills"],
    ["attrbox.core.targets"],
    ["attrbox.core.random_streams", "attrbox.methods.perturbation.superpixels"],
    [
        "attrbox.engine.site",
        "attrbox.engine.first_convolution",
        "attrbox.engine.autograd_graph",
        "attrbox.engine.feature_maps",
    ],
    ["attrbox.engine.operations.linearity"],
    ["attrbox.engine.batch_norm"],
    ["attrbox.engine.folding"],
    ["attrbox.engine.linear_maps"],
    ["attrbox.engine.operations.operation"],
    ["attrbox.engine.operations.elementwise"],
    ["attrbox.engine.operations.dependent", "attrbox.engine.operations.recurrent"],
    [
        "attrbox.engine.operations.products",
        "attrbox.engine.operations.reductions",
        "attrbox.engine.operations.decompositions",
    ],
    ["attrbox.engine.operations.table", "attrbox.engine.operations.layers"],
    ["attrbox.engine.recorder"],
    ["attrbox.engine.tape", "attrbox.engine.randomness"],
    ["attrbox.rules.lrp.norms", "attrbox.rules.lrp.layers"],
    ["attrbox.rules.lrp.activations"],
    ["attrbox.rules"],
    ["attrbox.masks"],
    ["attrbox.methods.base"],
    ["attrbox.methods.context.chunk", "attrbox.methods.context.quadrature"],
    ["attrbox.methods.context.recorded"],
    ["attrbox.methods.context.run"],
    ["attrbox.methods.context.finite", "attrbox.methods.learned.chain", "attrbox.methods.learned.parameters"],
    [
        "attrbox.methods.learned.optimization",
        "attrbox.methods.masking.optimization",
        "attrbox.methods.perturbation.perturbing",
    ],
    ["attrbox.methods.cam.grad_cam"],
    ["attrbox.methods"],
    ["attrbox.visualization.plots", "attrbox.data.maps.schema"],
    ["attrbox.data.maps.reader"],
    ["attrbox.data.maps.merge", "attrbox.methods.comparison"],
    ["attrbox.methods.diagnosis", "attrbox.methods.propagation.pattern_fitting"],
    ["attrbox.metrics.statistics", "attrbox.metrics.context"],
    ["attrbox.metrics.base"],
    ["attrbox.metrics.scores", "attrbox.metrics.sources"],
    ["attrbox.metrics.figures"],
    ["attrbox.metrics.results"],
    ["attrbox.metrics.faithfulness.curves", "attrbox.metrics.robustness.similarity", "attrbox.metrics.training"],
    ["attrbox.metrics"],
    ["attrbox.metrics.evaluation"],
    ["attrbox.data.images", "attrbox.data.models"],
    ["attrbox.pipeline.arguments", "attrbox.data.samples"],
    ["attrbox.data.maps.writer"],
    ["attrbox.pipeline.job"],
    ["attrbox.pipeline.shards"],
    ["attrbox.pipeline.export"],
    ["attrbox.pipeline.config"],
    ["attrbox.pipeline.from_config", "attrbox.pipeline.stored_scores"],
    ["attrbox.pipeline.evaluate_file", "attrbox.pipeline.report.page"],
    ["attrbox.pipeline.commands.options"],
    ["attrbox.pipeline.commands.configs"],
    ["attrbox.commands"],
    ["attrbox.pipeline.cli"],
    ["attrbox.__main__"],
]
# For annotations alone, that is, under TYPE_CHECKING.
ALLOWED_FOR_TYPES = {
    ("attrbox.methods.base", "attrbox.methods.context.run"),
    ("attrbox.metrics.base", "attrbox.metrics.sources"),
}

MODULES = {
    ".".join(("attrbox", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def layer(module: str) -> int:
    """The place of a module in LAYERS, by its longest name there."""
    places = {name: place for place, names in enumerate(LAYERS) for name in names}
    parts = module.split(".")
    for size in range(len(parts), 1, -1):
        if (name := ".".join(parts[:size])) in places:
            return places[name]
    raise AssertionError(f"{module} has no layer; put it into LAYERS")


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Names that a module imports from attrbox, and whether only for annotations; a relative import begins with "."."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["." * node.level + (node.module or "")]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in inside]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("attrbox", ""):
                yield name, id(node) in for_types


def violations(module: str, source: str) -> list[str]:
    found = []
    for name, for_types in imports(ast.parse(source)):
        if name.startswith(".") or name == "attrbox":
            found.append(f"{module} imports {name!r}; name the module in full: attrbox.errors")
        elif layer(name) >= layer(module) and not (for_types and (module, name) in ALLOWED_FOR_TYPES):
            found.append(f"{module} imports {name}, which is not below it")
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "attrbox"])
def test_imports_point_down(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    if MODULES[module].name == "__init__.py":
        assert not list(imports(ast.parse(source))), "packages import nothing"
    else:
        assert violations(module, source) == []


def test_every_layer_exists() -> None:
    assert [name for names in LAYERS for name in names if name not in MODULES] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("attrbox.engine.site", "from attrbox.engine.tape import Tape"),  # up, in a package
        ("attrbox.errors", "def f():\n    import attrbox.shapes"),  # up, in a function
        ("attrbox.core.model_state", "from attrbox.memory import backing_off"),  # sideways
        ("attrbox.rules.lrp.activations", "from attrbox.rules.guided import GuidedBackprop"),  # sideways, in a package
        ("attrbox.methods.cam.grad_cam", "from attrbox.methods import path"),  # sideways, by the package
        ("attrbox.methods.base", "from attrbox.methods.run import Run"),  # allowed for types only
        ("attrbox.methods.comparison", "from . import errors"),
        ("attrbox.methods.comparison", "import attrbox"),
        ("attrbox.methods.comparison", "from attrbox import explain"),
    ],
)
def test_violations_are_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("attrbox.methods.base", "if TYPE_CHECKING:\n    from attrbox.methods.run import Run"),
        (
            "attrbox.engine.tape",
            "from attrbox.engine import site, operations\nfrom attrbox import errors\nimport torch",
        ),
        ("attrbox.pipeline.cli", "import attrbox.compare as c, os"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(module, source) == []

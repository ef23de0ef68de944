"""Imports inside attrbox point down only, without a circle, and they are absolute."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "attrbox"

# From the bottom to the top: a module imports from its own folder and from folders above its own in this list.
LAYERS = ["errors", "core", "engine", "rules", "visualization", "data", "methods", "metrics", "pipeline", "__main__"]

MODULES = {
    ".".join(("attrbox", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
# These import all of their modules, so that methods and metrics are registered.
GATHERING = {"attrbox.methods", "attrbox.metrics"}


def layer(module: str) -> int:
    """The place of a module's folder in LAYERS."""
    return LAYERS.index(module.split(".")[1])


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Names that a module imports from attrbox, and whether only for annotations; a relative import begins with "."."""
    tree = ast.parse(source)
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
    for name, _ in imports(source):
        if name.startswith(".") or name == "attrbox":
            found.append(f"{module} imports {name!r}; name the module in full: attrbox.errors")
        elif layer(name) > layer(module):
            found.append(f"{module} imports {name}, which is above it")
    return found


def circle(below: Mapping[str, set[str]]) -> list[str]:
    """A circle of a graph, or nothing."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for following in sorted(below.get(name, ())):
            if found := search(following, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(below) if (found := search(name, []))), [])


def graph(for_types: bool = False) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    return {
        module: {name for name, types in imports(path.read_text(encoding="utf-8")) if for_types or not types}
        for module, path in MODULES.items()
        if module != "attrbox" and module not in GATHERING
    }


def test_the_layers_are_the_folders() -> None:
    entries = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert entries - {"__init__"} == set(LAYERS)
    assert len([path for path in ROOT.iterdir() if path.name != "__pycache__"]) <= 12


def test_no_folder_of_one_file() -> None:
    folders = [path.parent for path in ROOT.rglob("__init__.py")]
    assert [
        folder for folder in folders if len([one for one in folder.iterdir() if one.suffix or one.is_dir()]) < 3
    ] == []


def test_files_are_short() -> None:
    long = {path.name: lines for path in MODULES.values() if (lines := len(path.read_text().splitlines())) > 400}
    assert long == {}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "attrbox"])
def test_imports_point_down(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    if MODULES[module].name == "__init__.py" and module not in GATHERING:
        assert not list(imports(source)), "packages import nothing"
    else:
        assert violations(module, source) == []


def test_no_circle_of_modules() -> None:
    assert circle(graph()) == []


@pytest.mark.parametrize("package", [name for name in LAYERS if (ROOT / name).is_dir()])
def test_no_circle_of_folders(package: str) -> None:
    """Folders, and modules beside them, of one package."""

    def unit(module: str) -> str:
        return module.removeprefix(f"attrbox.{package}.").split(".")[0]

    inside = f"attrbox.{package}."
    below: dict[str, set[str]] = {}
    for module, names in graph().items():
        if module.startswith(inside):
            others = {unit(name) for name in names if name.startswith(inside)}
            below.setdefault(unit(module), set()).update(others - {unit(module)})
    assert circle(below) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("attrbox.engine.site", "from attrbox.methods.base import Method"),
        ("attrbox.errors", "def f():\n    import attrbox.core.results"),  # in a function
        ("attrbox.rules.guided", "if TYPE_CHECKING:\n    from attrbox.methods.base import Method"),  # for types
        ("attrbox.methods.comparison", "from . import errors"),
        ("attrbox.methods.comparison", "import attrbox"),
        ("attrbox.methods.comparison", "from attrbox import explain"),
    ],
)
def test_violations_are_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


def test_circles_are_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []

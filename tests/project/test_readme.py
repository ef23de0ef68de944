"""The README's code runs, and its table of methods is the registry's."""

import ast
import re
from pathlib import Path

import pytest
import torch

import attrbox

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 5
    # The same without a download, on small images, with few steps.
    smaller = {'weights="DEFAULT"': "weights=None", "224": "32", '"steps": 100': '"steps": 3'}
    code = "\n".join(blocks)
    for full, small in smaller.items():
        code = code.replace(full, small)
    names: dict[str, object] = {"dataset": torch.randn(20, 3, 32, 32)}
    try:
        exec(code, names)
        assert names["maps"].values.shape == (4, 3, 32, 32)
        assert names["result"]["grad_cam"].heatmap().shape == (4, 32, 32)
        assert (tmp_path / "comparison.png").stat().st_size > 10_000
        assert (tmp_path / "maps.h5").exists()
        assert set(names["scores"]) == {"saliency", "deeplift", "grad_cam", "random", "sobel"}
        assert names["summary"].complete
        assert names["photographs"].photograph(0).size == (400, 300)
        assert names["scores"]["saliency"]["morf"].auc.shape == (4,)
    finally:
        for registry in (attrbox.method_registry, attrbox.rule_registry):
            if "absolute" in registry:
                registry.remove("absolute")


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_table_lists_every_metric_and_where_better_is():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([a-z, ]+) \|", section("Measuring"), flags=re.M)
    found = {}
    for names, better in rows:
        listed, directions = re.findall(r"\w+", names), better.split(", ")
        found |= dict(zip(listed, directions if len(directions) > 1 else directions * len(listed), strict=True))
    assert found == {name: attrbox.metric_registry[name].better for name in attrbox.list_metrics()}


def test_the_table_lists_every_method():
    rows = re.findall(r"^\| `(\w+)`(?: \[([^\]]+)\])? \|", section("Methods"), flags=re.M)
    assert {name for name, _ in rows} == set(attrbox.list_methods())
    for name, alias in rows:
        assert not alias or attrbox.method_registry[alias].name == name


def test_all_is_what_is_there():
    assert set(dir(attrbox)) == {*attrbox.__all__, "__version__"}
    modules = {path.stem for path in Path(attrbox.__file__).parent.iterdir()} - {"errors"}
    assert modules.isdisjoint(attrbox.__all__)  # no public name is the name of a module or package
    for name in attrbox.__all__:
        assert type(getattr(attrbox, name)).__name__ != "module" or name == "errors"
    with pytest.raises(AttributeError, match="has no attribute 'explian'"):
        attrbox.explian  # noqa: B018


def test_what_editors_see_is_what_is_there():
    """The names that are imported for type checkers are those that are imported on demand, from the same places."""
    tree = ast.parse(Path(attrbox.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == attrbox._HOME
    assert all(alias.name == alias.asname for node in block.body for alias in node.names)


PAGES = [
    "README.md",
    "benchmarks/README.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))),
]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:attrbox|tests|benchmarks|docs|configs)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link


def test_files_that_the_architecture_names_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:core|engine|rules|methods|metrics|data|pipeline|visualization)/[\w/]+\.py)`", text)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / "attrbox" / name).exists()] == []

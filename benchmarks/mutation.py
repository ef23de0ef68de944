"""Break attrbox in small ways, one at a time, and see whether a test notices.

    python benchmarks/mutation.py map                                   which functions each test calls; resumes
    python benchmarks/mutation.py run attrbox/methods --sample 200      breaks them; resumes
    python benchmarks/mutation.py report attrbox/methods                the score by module, and what survived

A mutant is one operator, constant, condition, argument or statement changed. It is written into a copy of the
repository, never in place, and the tests that call its function run there, the quickest of each kind first, until one
fails. Every run is a fork of an interpreter that has the libraries loaded, so that most mutants cost a few seconds. A
mutant is known by its function and its text: results stay valid while other functions change. `--seed` fixes the order
of the sample, so that a larger `--sample` continues a smaller one.
"""

import argparse
import ast
import builtins
import contextlib
import copy
import difflib
import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "torch torchvision numpy scipy.ndimage scipy.stats h5py tqdm matplotlib.pyplot PIL.Image typer.testing rich "
    "safetensors.torch skimage.segmentation captum.attr zennit hypothesis.strategies torch.utils.data torch.fx"
).split()

# --------------------------------------------------------------------------------------------------------- mutants


@dataclass(frozen=True)
class Mutant:
    """One change: the bytes from `start` to `end` of a file become `text`."""

    path: str
    scope: str  # of the innermost function, "" at the module's level
    line: int
    start: int
    end: int
    text: str
    key: str
    original: bytes

    def source(self) -> str:
        return (self.original[: self.start] + self.text.encode() + self.original[self.end :]).decode()

    def diff(self) -> str:
        lines = self.original.decode().splitlines()
        changed = difflib.unified_diff(lines, self.source().splitlines(), lineterm="", n=0)
        return "\n".join(line for line in changed if not line.startswith(("---", "+++", "@@")))


COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# Methods whose receiver can stand for their result.
TRANSPARENT = frozenset(
    "abs clamp clamp_min clamp_max detach clone contiguous cpu float double to expand relu sign neg nan_to_num cumsum "
    "flip sqrt square copy casefold lower strip item exp log movedim transpose requires_grad_ sum_to_size".split()
)
CHOOSING = frozenset("max min sorted abs int float reversed".split())
# Arguments that are words or manners, and checks of what holds anyway.
UNTESTED_ARGUMENTS = frozenset(
    "strict stacklevel help summary reference units desc leave delay encoding description frozen kw_only repr".split()
)


def variants(node: ast.AST) -> Iterator[ast.AST | str]:
    """What may stand in the place of a node; a string is the text of a statement."""
    match node:
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                changed = copy.deepcopy(node)
                changed.ops[place] = COMPARISONS[type(operator)]()
                yield changed
        case ast.BinOp(op=operator) if type(operator) in ARITHMETIC and not (
            _is_text(node.left) or _is_text(node.right)
        ):
            yield ast.BinOp(node.left, ARITHMETIC[type(operator)](), node.right)
        case ast.BoolOp():
            for place in range(len(node.values)):
                rest = [value for other, value in enumerate(node.values) if other != place]
                yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield ast.Constant(node.value + 1)
        case ast.Constant(value=float()):
            yield ast.Constant(2 * node.value or 1.0)
        case ast.IfExp():
            yield node.body
            yield node.orelse
        case ast.Call(func=ast.Attribute() as method) if method.attr in TRANSPARENT:
            yield method.value
        case ast.Call(func=ast.Name(id=name), args=[_, *_]) if name in CHOOSING:
            yield from (argument for argument in node.args if not isinstance(argument, ast.Starred))
        case ast.Call(func=ast.Attribute(attr="where"), args=[condition, one, other]):
            yield ast.Call(node.func, [condition, other, one], node.keywords)
        case ast.AugAssign(op=operator):
            yield "pass"
            if type(operator) in ARITHMETIC:
                yield ast.AugAssign(node.target, ARITHMETIC[type(operator)](), node.value)
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Delete() | ast.Break() | ast.Continue():
            yield "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "pass"
    if isinstance(node, ast.Call):
        for place, keyword in enumerate(node.keywords):
            if keyword.arg is not None and keyword.arg not in UNTESTED_ARGUMENTS:
                changed = copy.deepcopy(node)
                del changed.keywords[place]
                yield changed


def conditions(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Expressions that decide on something, with what may stand in their place."""
    match node:
        case ast.If():
            yield node.test, ast.Constant(True)
            yield node.test, ast.Constant(False)
        case ast.While():
            yield node.test, ast.Constant(False)
        case ast.comprehension():
            for test in node.ifs:
                yield test, ast.Constant(True)
        case ast.With():
            nothing = ast.parse("__import__('contextlib').nullcontext()", mode="eval").body
            for item in node.items:
                if item.optional_vars is None:
                    yield item.context_expr, nothing


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """The children of a node that may be changed: no annotations, messages, or checks for the type checker."""
    skipped: list[Any] = []
    match node:
        case ast.JoinedStr() | ast.Raise() | ast.Assert() | ast.Import() | ast.ImportFrom():
            return
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.AnnAssign():
            skipped = [node.annotation, node.target]
        case ast.arg():
            return
        case ast.FunctionDef():
            skipped = [node.returns]
        case ast.Call(func=ast.Name(id="TypeVar" | "cast") | ast.Attribute(attr="warn" | "cast")):
            return
        case ast.Call():
            skipped = [keyword for keyword in node.keywords if keyword.arg in UNTESTED_ARGUMENTS]
        case ast.Subscript(ctx=ast.Load(), value=ast.Name(id="Literal" | "Callable" | "Mapping" | "Sequence")):
            return
    yield from (child for child in ast.iter_child_nodes(node) if child not in skipped)


def scoped(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The nodes of a module, each with the qualified name of the function or class that it is in."""
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        scope, node = stack.pop()
        yield scope, node
        inner = scope
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{scope}.{node.name}".lstrip(".")
        stack.extend((inner, child) for child in reversed(list(_parts(node))))


def mutants(root: Path, path: str) -> list[Mutant]:
    """All mutants of a file."""
    source = (root / path).read_bytes()
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found, seen = [], Counter[str]()
    for scope, node in scoped(ast.parse(source)):
        changes = [(node, changed) for changed in variants(node)] + list(conditions(node))
        for old, new in changes:
            start, end = (lines[old.lineno - 1] + old.col_offset, lines[old.end_lineno - 1] + old.end_col_offset)
            text = new if isinstance(new, str) else ast.unparse(ast.fix_missing_locations(new))
            text = f"({text})" if isinstance(new, ast.expr) else text
            around = source[lines[old.lineno - 1] : lines[old.end_lineno]].strip().decode()
            name = f"{path}\n{scope}\n{around}\n{source[start:end].decode()}\n{text}"
            seen[name] += 1
            key = hashlib.sha256(f"{name}\n{seen[name]}".encode()).hexdigest()[:16]
            found.append(Mutant(path, scope, old.lineno, start, end, text, key, source))
    return found


def files(root: Path, paths: list[str]) -> list[str]:
    """The modules below these paths."""
    found = [root / path for path in paths or ["attrbox"]]
    modules = [file for path in found for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return [str(file.relative_to(root)) for file in dict.fromkeys(modules)]


# ---------------------------------------------------------------------------------------------------- runs in a fork


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A copy of the repository for the time being."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        place = Path(folder, "tree")
        ignored = shutil.ignore_patterns(".git", ".*", "out", "results", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, place, ignore=ignored)
        if (ROOT / "benchmarks/paper/results").exists():
            shutil.copytree(ROOT / "benchmarks/paper/results", place / "benchmarks/paper/results", dirs_exist_ok=True)
        yield place


def preload() -> None:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="Agg")
    for name in PRELOADED:
        with contextlib.suppress(ImportError), warnings.catch_warnings(action="ignore"):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    gc.freeze()  # collecting in a fork need not go through all of them


class Watch:
    """A pytest plugin: only the chosen tests, in the order given; their times, outcomes and calls."""

    def __init__(self, chosen: list[str] | None, calls: set[str]) -> None:
        self.chosen = chosen
        self.calls = calls
        self.imported: list[str] = []
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: str | None = None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.imported = sorted(self.calls)
        if self.chosen is not None:
            order = {name: place for place, name in enumerate(self.chosen)}
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.calls.clear()
        began = time.perf_counter()
        result = yield
        one = self.tests.setdefault(item.nodeid, {})
        one |= {"seconds": round(time.perf_counter() - began, 3), "calls": sorted(self.calls)}
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid
        if report.failed or report.skipped:
            self.tests.setdefault(report.nodeid, {})["unfit"] = True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed = self.failed or f"import of {report.nodeid}"


def forked(work: Callable[[], Any], folder: Path, seconds: float) -> Any:
    """What `work` returns in a fork, run in `folder`; None if it crashes or takes more than these seconds of a CPU."""
    answer = folder.parent / "answer.json"
    answer.unlink(missing_ok=True)
    sys.stdout.flush()
    with warnings.catch_warnings(action="ignore"):  # newer Pythons warn of forks beside threads
        child = os.fork()
    if not child:
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
            resource.setrlimit(resource.RLIMIT_DATA, (12 * 2**30, 12 * 2**30))
            log = os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["PYTHONPATH"] = str(folder)
            sys.path[:0] = [str(folder), str(folder / "tests/support")]
            answer.write_text(json.dumps(work()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + 5 * seconds  # the machine may be shared
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it left behind
    return json.loads(answer.read_text()) if answer.exists() else None


def pytest_run(watch: Watch, arguments: list[str]) -> int:
    options = "-q -p no:cacheprovider -p no:xdist -p no:hypothesispytest -W ignore::pytest.PytestAssertRewriteWarning"
    return int(pytest.main([*options.split(), *arguments], plugins=[watch]))


# --------------------------------------------------------------------------------------------------------------- map


def instrument(file: Path, name: str) -> None:
    """Let each function of a module say that it was called."""
    tree = ast.parse(file.read_bytes())
    for scope, node in list(scoped(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            place = 1 if ast.get_docstring(node, clean=False) is not None else 0
            qualified = f"{name}::{scope}.{node.name}".replace("::.", "::")
            node.body.insert(place, ast.parse(f"_called({qualified!r})").body[0])
    place = 1 if ast.get_docstring(tree, clean=False) is not None else 0
    known = ast.parse("import builtins; _called = getattr(builtins, '_called', lambda name: None)").body
    tree.body[place:place] = known
    file.write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")


def map_tests(out: Path, seconds: float) -> None:
    done = {record["file"] for record in read(out / "tests.jsonl")}
    with copied() as folder:
        for name in files(folder, ["attrbox"]):
            instrument(folder / name, name)
        for file in sorted(folder.rglob("tests/*/*_*.py")):
            name = file.relative_to(folder).as_posix()
            if name in done:
                continue

            def work(name: str = name) -> dict[str, Any]:
                calls: set[str] = set()
                builtins._called = calls.add  # type: ignore[attr-defined]
                watch = Watch(None, calls)
                pytest_run(watch, [name])
                return {"file": name, "imported": watch.imported, "tests": watch.tests}

            began = time.perf_counter()
            found = forked(work, folder, seconds)
            print(f"{name}: {time.perf_counter() - began:.0f} s", "" if found else "NOT MAPPED", flush=True)
            if not found:
                print((folder.parent / "log.txt").read_text(encoding="utf-8")[-2000:], flush=True)
            else:
                unfit = [test for test, one in found["tests"].items() if one.get("unfit")]
                print("".join(f"    left out: {test}\n" for test in unfit), end="", flush=True)
                append(out / "tests.jsonl", found)


@dataclass(frozen=True)
class Test:
    """A test that can be run against a mutant."""

    name: str
    file: str
    kind: str  # the same function with other parameters is of the same kind
    seconds: float


class Tests:
    """The map: which tests call a function."""

    def __init__(self, out: Path) -> None:
        self._of: dict[str, list[Test]] = defaultdict(list)
        self._sizes: Counter[str] = Counter()
        for record in read(out / "tests.jsonl"):
            for name, one in record["tests"].items():
                if one.get("unfit") or not (ROOT / record["file"]).exists():
                    continue
                self._sizes[record["file"]] += 1
                test = Test(name, record["file"], name.split("[")[0], one["seconds"])
                called = {*record["imported"], *one["calls"]}
                for function in called | {call.split("::")[0] for call in called}:
                    self._of[function].append(test)

    def of(self, mutant: Mutant, budget: float) -> list[list[Test]]:
        """The tests of a mutant, in two batches: the quickest of the files that are about it, then one of each kind
        after the other."""
        scope = mutant.scope
        while scope and f"{mutant.path}::{scope}" not in self._of:
            scope = scope.rpartition(".")[0]
        found = self._of.get(f"{mutant.path}::{scope}" if scope else mutant.path, [])
        found = sorted(found, key=lambda test: test.seconds)
        stem = Path(mutant.path).stem
        counts = Counter(test.file for test in found)
        about = sorted(counts, key=lambda file: (stem not in file, -(counts[file] ** 2) / self._sizes[file]))[:3]
        first = _within([test for test in found if test.file in about], budget / 4)
        rank: Counter[str] = Counter()
        ranked = []
        for test in found:
            ranked.append((rank[test.kind], test.seconds, test))
            rank[test.kind] += 1
        ordered = [test for _, _, test in sorted(ranked, key=lambda one: one[:2])]
        rest = _within([test for test in ordered if test not in set(first)], budget)
        return [batch for batch in (first, rest) if batch]


def _within(tests: list[Test], budget: float) -> list[Test]:
    chosen: list[Test] = []
    for test in tests:
        if test.seconds <= budget:
            chosen.append(test)
            budget -= test.seconds
    return chosen


# --------------------------------------------------------------------------------------------------------------- run


def run(out: Path, paths: list[str], sample: int, seed: int, budget: float, minutes: float, keys: list[str]) -> None:
    tests = Tests(out)
    done = {record["key"] for record in read(out / "mutants.jsonl")}
    end = time.monotonic() + 60 * minutes
    with copied() as folder:
        every = [mutant for path in files(folder, paths) for mutant in mutants(folder, path)]
        # Each equally likely, in an order of which a larger sample takes more.
        every.sort(key=lambda mutant: hashlib.sha256(f"{seed} {mutant.key}".encode()).digest())
        chosen = [mutant for mutant in every[:sample] if mutant.key not in done]
        if keys:
            chosen = [mutant for mutant in every if mutant.key in keys]
        sys.dont_write_bytecode = False
        forked(lambda: pytest_run(Watch([], set()), ["--collect-only", "tests"]), folder, 600)  # compiles once for all
        sys.dont_write_bytecode = True
        for number, mutant in enumerate(chosen):
            if time.monotonic() > end:
                break
            record = attempt(folder, mutant, tests.of(mutant, budget))
            append(out / "mutants.jsonl", record)
            said = record["by"] if record["killed"] else "SURVIVED\n" + record["diff"]
            print(f"{number + 1}/{len(chosen)} {mutant.path}:{mutant.line} {record['seconds']} s {said}", flush=True)


def attempt(folder: Path, mutant: Mutant, batches: list[list[Test]]) -> dict[str, Any]:
    """Run the tests of a mutant until one fails."""
    file = folder / mutant.path
    kept, stat = file.read_bytes(), file.stat()
    file.write_text(mutant.source(), encoding="utf-8")
    began, by = time.perf_counter(), None
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    try:
        for batch in batches:

            def work(batch: list[Test] = batch) -> list[Any]:
                watch = Watch([test.name for test in batch], set())
                code = pytest_run(watch, ["-x", *dict.fromkeys(test.file for test in batch)])
                return [code, watch.failed, len(watch.tests)]

            found = forked(work, folder, 60 + 4 * sum(test.seconds for test in batch))
            if found is None:
                by = "crash or timeout"
            elif found[0] != 0:
                by = found[1] or f"exit code {found[0]}"
            if by:
                break
    finally:
        file.write_bytes(kept)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return {
        "key": mutant.key,
        "path": mutant.path,
        "line": mutant.line,
        "scope": mutant.scope,
        "diff": mutant.diff(),
        "killed": by is not None,
        "by": by,
        "tests": sum(map(len, batches)),
        "seconds": round(time.perf_counter() - began, 1),
    }


# ------------------------------------------------------------------------------------------------------------ report


def report(out: Path, paths: list[str]) -> None:
    """The score of each module on the mutants that its code of today still has."""
    last = {record["key"]: record for record in read(out / "mutants.jsonl")}
    survivors, killed, total = [], Counter[str](), Counter[str]()
    every = Counter[str]()
    for path in files(ROOT, paths):
        for mutant in mutants(ROOT, path):
            every[path] += 1
            record = last.get(mutant.key)
            if record:
                total[path] += 1
                killed[path] += record["killed"]
                if not record["killed"]:
                    survivors.append((mutant, record))
    print("| module | mutants | tried | killed |\n|---|---:|---:|---:|")
    for path in total:
        print(f"| {path} | {every[path]} | {total[path]} | {killed[path]} ({killed[path] / total[path]:.0%}) |")
    if total:
        share = killed.total() / total.total()
        print(f"| all | {every.total()} | {total.total()} | {killed.total()} ({share:.1%}) |")
    for mutant, record in survivors:
        print(f"\n{mutant.path}:{mutant.line} {mutant.scope} {mutant.key} ({record['tests']} tests)\n{mutant.diff()}")


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def append(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["map", "run", "report"])
    parser.add_argument("paths", nargs="*", help="modules or folders of them; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "out/mutation")
    parser.add_argument("--sample", type=int, default=200, help="mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--budget", type=float, default=20, help="seconds of tests for a mutant that none of them kills"
    )
    parser.add_argument("--minutes", type=float, default=600, help="begin no other mutant after so long")
    parser.add_argument("--keys", nargs="*", default=[], help="these mutants again, as report names them")
    given = parser.parse_args()
    if given.command != "report":
        preload()
    if given.command == "map":
        map_tests(given.out, 3000)
    elif given.command == "run":
        run(given.out, given.paths, given.sample, given.seed, given.budget, given.minutes, given.keys)
    else:
        report(given.out, given.paths)


if __name__ == "__main__":
    main()

"""Random networks as short lists of steps, written out as Python code in several spellings.

    Network((3, 6, 5), ("conv", "relu", ("residual", ("conv depthwise", "silu")), "max_pool overlapping"), seed=3)

is a model of [N, 3, 6, 5] -> 3 scores; `code` is what a user would write. A step that does not fit the shape at its
place is left out, so any list of steps is a network: that is what lets a failure shrink. All spellings are one
function:

    modules      nn.ReLU(), nn.Conv2d(...), ... each called once, or again where a step says so
    functional   F.relu(x), x.relu(), x.clamp(min=0), F.conv2d(x, self.conv1.weight, ...), torch.add(x, y)
    in place     torch.relu_(x), nn.ReLU(inplace=True), x += y, wherever autograd allows it
    nested       runs of modules in nested nn.Sequential
"""

import copy
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPELLINGS = ("modules", "functional", "in place", "nested")
CLASSES = 3
MOST = 3000  # numbers in an activation of one image

Step = str | tuple[Any, ...]


class UnfitError(Exception):
    """A step that is not defined on the activation at its place."""


@dataclass
class State:
    """Where the writer is.

    Attributes:
        x: the variable that holds the activation.
        target: the variable that the next step writes.
        owned: whether nothing else needs the activation's values, so that a step may write over them.
        saved: whether autograd needs them.
        channels_last: whether the channels are the last axis.
        pending: modules that wait to be laid into a nested Sequential, which starts from the variable `before`.
        reusable: modules with their spellings.
        used: the steps that fitted.
    """

    x: str = "x"
    target: str = "x"
    owned: bool = True
    saved: bool = False
    channels_last: bool = False
    before: str = "x"
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    reusable: list[tuple[Any, ...]] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    scope: dict[str, Any] = field(default_factory=dict)

    def copied(self) -> "State":
        return replace(self, **{name: copy.copy(value) for name, value in vars(self).items()})


class Writer:
    """Writes a network in one spelling, and runs each line at once on two images, to know the shapes."""

    def __init__(self, shape: Sequence[int], spelling: str, seed: int) -> None:
        self.spelling = spelling
        self.random = random.Random(seed)
        known = {"torch": torch, "nn": nn, "F": F, "self": nn.Module().eval(), "x": torch.ones(2, *shape)}
        self.state = State(scope=known)

    # ------------------------------------------------------------------------------------- what steps look at

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the activation, without the batch."""
        return self.shape_of(self.state.x)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self.state.scope[name].shape[1:])

    @property
    def channels(self) -> int:
        return self.shape[-1 if self.state.channels_last else 0]

    @property
    def spatial(self) -> int:
        """How many spatial axes there are, behind the channels."""
        self.need(not self.state.channels_last)
        return len(self.shape) - 1

    def need(self, condition: bool) -> None:
        """Leave the step out unless this holds."""
        if not condition:
            raise UnfitError

    # ------------------------------------------------------------------------------------------ what steps write

    def make(self, code: str, name: str = "") -> str:
        """`self.conv1 = nn.Conv2d(...)`; "self.conv1"."""
        kind = name or re.sub(r"\dd$", "", code.split("(")[0].rpartition(".")[2]).lower()
        self.state.counts[kind] += 1
        attribute = f"self.{kind}{self.state.counts[kind]}"
        self.state.init.append(f"{attribute} = {code}")
        self._execute(self.state.init[-1])
        made = eval(attribute, self.state.scope)
        if isinstance(made, nn.Module):
            made.eval()
        return attribute

    def parameter(self, *shape: int) -> str:
        return self.make(f"nn.Parameter(torch.zeros({', '.join(map(str, shape))}))", "weight")

    def module(self, code: str, *functional: str, in_place: Sequence[str] = (), **marks: bool) -> None:
        """A module, or its functional spellings of {x}, with the module {m}'s parameters."""
        call = (self.make(code), functional, in_place, marks)
        self.state.reusable.append(call)
        self.call(*call)

    def call(self, module: str, functional: Sequence[str], in_place: Sequence[str], marks: dict[str, bool]) -> None:
        """Use a module that there is already."""
        if self.spelling == "nested":
            self._note(f"{self.state.target} = {module}({self.state.x})", marks, written=False)
            self.state.pending.append(module)
        elif self.spelling == "functional" and functional:
            self._execute(f"{module}({self.state.x})")  # which may refuse what its functional spelling takes
            self.run(*(code.replace("{m}", module) for code in functional), **marks)
        else:
            self.run(f"{module}({{x}})", in_place=in_place, **marks)

    def run(self, *codes: str, in_place: Sequence[str] = (), **marks: bool) -> None:
        """An expression of {x}: the first one, or any in the functional spelling; in place where that is allowed.

        Marks: `fresh` (a new tensor, default), `saved` (autograd keeps the result, default), `channels_last`.
        """
        self.flush()
        state = self.state
        if self.spelling == "in place" and in_place and state.owned and not state.saved and state.x == state.target:
            code = self.random.choice(in_place)
            if code.startswith("nn."):
                code = f"{self.make(code)}({{x}})"
                line = f"{state.x} = {code}"
            else:  # the result may be dropped: what was written must count
                line = code if "=" in code.split("(")[0] or self.random.random() < 0.5 else f"{{x}} = {code}"
            self._note(line.replace("{x}", state.x), {"saved": True, **marks, "fresh": False})
            return
        code = self.random.choice(codes) if self.spelling == "functional" else codes[0]
        self._note(f"{state.target} = {code.replace('{x}', state.x)}", marks)

    def branch(self, steps: Sequence[Step]) -> str:
        """Steps on a variable of their own, from the activation on; its name."""
        self.flush()
        before = self.state.x, self.state.target, self.state.channels_last, self.state.owned, self.state.saved
        self.state.counts["x"] += 1
        self.state.target, self.state.owned = f"x{self.state.counts['x']}", False
        self.steps(steps)
        self.flush()
        if self.state.channels_last != before[2]:
            raise UnfitError
        made, owned = self.state.x, self.state.owned and not self.state.saved
        self.state.x, self.state.target, self.state.channels_last, self.state.owned, self.state.saved = before
        self.state.owned = False  # the branch reads it
        self.branch_owned = owned
        return made

    def steps(self, steps: Sequence[Step]) -> None:
        """Those of the steps that fit."""
        from network_blocks import BLOCKS, STEPS

        for step in steps:
            before = self.state.copied()
            try:
                if isinstance(step, str):
                    STEPS[step](self)
                else:
                    BLOCKS[step[0]](self, *step[1:])
                value = self.state.scope[self.state.x]
                self.need(0 < value[0].numel() <= MOST and value.dim() > 1 and len(value) == 2)
            except (
                UnfitError,
                RuntimeError,
                ValueError,
                IndexError,
                AssertionError,
            ):  # but for the first torch's, on shapes
                self.state = before
            else:
                self.state.used.append(step if isinstance(step, str) else step[0])

    def flush(self) -> None:
        """Write what waits to be laid into a nested Sequential."""
        waiting, self.state.pending = self.state.pending, []
        if waiting:
            first, *rest = waiting
            inner = ", ".join([f"nn.Sequential({', '.join([first, *rest[:1]])})", *rest[1:]])
            name = self.make(f"nn.Sequential({inner})", "nested")
            self.state.forward.append(f"{self.state.target} = {name}({self.state.before})")

    def _note(self, line: str, marks: dict[str, bool], written: bool = True) -> None:
        state = self.state
        if not state.pending:
            state.before = state.x  # what a nested Sequential starts from
        self._execute(line)
        if written:
            state.forward.append(line)
        fresh = marks.get("fresh", True)
        state.x = state.target
        state.owned = True if fresh else state.owned
        state.saved = marks.get("saved", True) if fresh or "saved" in marks else state.saved
        state.channels_last = marks.get("channels_last", state.channels_last)

    def _execute(self, line: str) -> None:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            exec(line, self.state.scope)


@dataclass(frozen=True)
class Network:
    """A network of [N, *shape] -> 3 scores."""

    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    seed: int = 0

    def written(self, spelling: str) -> State:
        writer = Writer(self.shape, spelling, self.seed)
        writer.steps(self.steps)
        writer.flush()
        if len(writer.shape) > 1:
            writer.module("nn.Flatten()", "{x}.flatten(1)", fresh=False)
        writer.module(f"nn.Linear({writer.shape[0]}, {CLASSES})", "F.linear({x}, {m}.weight, {m}.bias)")
        writer.flush()
        return writer.state

    @cached_property
    def used(self) -> list[str]:
        """The steps that fitted."""
        return self.written("modules").used

    def code(self, spelling: str = "modules", name: str = "Net") -> str:
        state = self.written(spelling)
        init, forward = (["super().__init__()", *state.init], [*state.forward, f"return {state.x}"])
        lines = [f"class {name}(nn.Module):", "    def __init__(self):", *(f"        {line}" for line in init)]
        return "\n".join([*lines, "", "    def forward(self, x):", *(f"        {line}" for line in forward)])

    def model(self, spelling: str = "modules") -> nn.Module:
        names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
        exec(self.code(spelling), names)
        with torch.random.fork_rng(devices=[]):
            return weighted(names["Net"](), self.seed)

    @property
    def images(self) -> Tensor:
        return torch.randn(2, *self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))


def weighted(model: nn.Module, seed: int) -> nn.Module:
    """Weights that keep the signal's size, biases and statistics away from 0 and 1; in float64."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.double().eval().named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            numbers = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
            if name.endswith("var"):
                numbers = numbers.abs() + 0.5
            elif tensor.dim() < 2:  # of norms and biases
                numbers = numbers / 3 + name.endswith("weight")
            else:
                numbers = numbers * 1.5 / tensor[0].numel() ** 0.5
            tensor.data.copy_(numbers)
    return model

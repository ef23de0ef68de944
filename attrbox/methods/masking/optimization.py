"""What the methods that optimise masks have in common: the loop over iterations, for many masks at once.

A chunk has one mask per image, target and area, all in one batch: [m] with m = n K A. Each is a problem of its own, so
the losses are summed and no step of one depends on another. An iteration makes the masks from their parameters, shows
the model what they leave, and steps along

    gradient of (penalty - reward) with respect to the parameters

The gradient of the reward comes from a pass over plain images (`Run.scored`), and is handed to the masks as a constant;
so no graph spans the model and the masks, and passes are chunked and back off as everywhere.
"""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attrbox.core.fills import need_images
from attrbox.core.options import option
from attrbox.core.targets import UNITS
from attrbox.core.validation import check_choice, check_count, check_number
from attrbox.errors import InputError, OptimisationWarning
from attrbox.methods.base import Method
from attrbox.methods.context.run import Run


@dataclass(frozen=True, kw_only=True)
class Optimised(Method):
    """Options of all methods that optimise masks.

    `seconds` makes the result depend on the speed of the machine and on the chunk: for a first look, not for a table.
    """

    iterations: int = option(300, "steps of the optimiser")
    step: int = option(8, "pixels per parameter of the mask")
    seconds: float | None = option(
        None, "stop each chunk after so many seconds too; then maps depend on the machine and on batch_size"
    )
    score: str | None = option(None, "what a class scores: logit, contrast, prob or log_prob; None: as published")
    history: int = option(10, "masks to keep along the way, as coarse as their parameters; 0 for none")

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations)
        check_count("step", self.step)
        if self.seconds is not None:
            check_number("seconds", self.seconds, above=0)
        if self.score is not None:
            check_choice("score", self.score, UNITS)
        check_count("history", self.history, least=0)

    def sides(self, run: Run) -> tuple[int, int]:
        """Height and width of the images.

        Raises:
            InputError: they have none, or are smaller than what one parameter of the mask covers.
        """
        need_images(run.images, type(self).__name__.lower())
        height, width = run.images.shape[-2:]
        if self.step > min(height, width):
            raise InputError(
                f"A mask with step={self.step} pixels per parameter is larger than the images, {height} x {width} "
                "pixels. Use a smaller step."
            )
        return height, width

    def optimise(self, run: Run, problem: "Problem") -> "Optimum":
        """Minimise the loss of each mask."""
        leaf = problem.start().contiguous().requires_grad_()
        optimiser = problem.optimiser(leaf)
        m = len(leaf)
        losses = leaf.new_full((m, self.iterations), torch.nan)
        rewards = torch.full_like(losses, torch.nan)
        alive = torch.ones(m, dtype=torch.bool, device=leaf.device)
        steps = torch.zeros(m, dtype=torch.int64, device=leaf.device)
        wanted = _evenly(self.history, self.iterations)
        kept: list[Tensor] = []
        began = time.monotonic()
        for step in range(self.iterations):
            with torch.enable_grad():
                masks = problem.masks(leaf)
                penalty = problem.penalty(leaf, masks, step)
            reward, slope = problem.play(masks.detach(), step)
            losses[:, step] = penalty.detach() - reward
            rewards[:, step] = reward
            (gradient,) = torch.autograd.grad((penalty.sum(), masks), leaf, (None, -slope))
            # A loss that is not finite stops its mask; told apart on the device, so that nothing waits for it.
            alive = alive & losses[:, step].isfinite() & gradient.flatten(1).isfinite().all(1)
            moves = alive.view(-1, *(1,) * (leaf.dim() - 1))
            leaf.grad = gradient
            before = leaf.detach().clone()
            optimiser.step()
            with torch.no_grad():
                leaf.copy_(torch.where(moves, leaf.clamp(0, 1), before))
            steps += alive
            kept += [leaf.detach().clone()] * wanted.count(step + 1)
            if self.seconds is not None and time.monotonic() - began >= self.seconds:
                break
        kept += [leaf.detach().clone()] * (self.history - len(kept))
        self._warn(run, alive)
        return Optimum(
            leaf.detach(), losses, rewards, steps, ~alive, torch.stack(kept, 1) if kept else leaf.new_empty(m, 0)
        )

    def _warn(self, run: Run, alive: Tensor) -> None:
        if alive.is_meta or bool(alive.all()):
            return
        rows = (~alive).view(len(run.images), -1).any(1).nonzero().flatten() + run.rows.start
        warnings.warn(
            f"The loss of images {rows.tolist()} became NaN or infinite; their masks stay as they were in the "
            "iteration before (details['failed']). Look for overflow in the scores.",
            OptimisationWarning,
            stacklevel=2,
        )


class Problem(ABC):
    """The masks of a chunk, their rewards and penalties. [m] counts images, targets and areas, in this order."""

    @abstractmethod
    def start(self) -> Tensor:
        """Parameters to begin with, [m, h, w], in [0, 1]."""

    @abstractmethod
    def optimiser(self, leaf: Tensor) -> torch.optim.Optimizer:
        """The published optimiser over the parameters."""

    @abstractmethod
    def masks(self, parameters: Tensor) -> Tensor:
        """The masks that the parameters stand for, [m, ...], with their graph."""

    @abstractmethod
    def play(self, masks: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The reward [m] of what the masks leave to see, and its gradient with respect to the masks, [m, ...]."""

    @abstractmethod
    def penalty(self, parameters: Tensor, masks: Tensor, step: int) -> Tensor:
        """What the masks cost besides, [m], with its graph."""


@dataclass(frozen=True)
class Optimum:
    """Where the optimiser stopped, for each of m masks.

    Attributes:
        parameters: [m, h, w].
        losses, rewards: of each iteration, [m, iterations]; NaN after the last.
        steps: iterations done, [m].
        failed: whether the loss became NaN or infinite, [m].
        history: parameters along the way, [m, S, h, w].
    """

    parameters: Tensor
    losses: Tensor
    rewards: Tensor
    steps: Tensor
    failed: Tensor
    history: Tensor

    def details(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """The same by name, [n, K, ...] or [n, K, A, ...], as `shape` says."""
        named = {
            "loss": self.losses,
            "reward": self.rewards,
            "iterations": self.steps,
            "failed": self.failed,
            "history": self.history,
        }
        return {name: values.reshape(*shape, *values.shape[1:]) for name, values in named.items()}


def _evenly(count: int, iterations: int) -> list[int]:
    """`count` iterations from the first to the last, evenly spaced; some come twice if there are fewer."""
    if count < 2:
        return [iterations] * count
    return [round(1 + index * (iterations - 1) / (count - 1)) for index in range(count)]


def everyone(n: int, targets: int, areas: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Image and target of each of n K A masks, two tensors [m]."""
    index = torch.arange(n * targets * areas, device=like.device)
    return index // (targets * areas), index // areas % targets

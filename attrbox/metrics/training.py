"""Training of small classifiers from scratch, for metrics that need other models: ROAR, label randomisation.

    model = train(lambda: SmallNet(), images, labels, Trainer(epochs=5), seed=0)

Everything random (weights, batches, dropout) comes from the seed, and the global random state is left alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrbox.core.model_state import untouched
from attrbox.core.outputs import unwrap
from attrbox.core.random_streams import mixed
from attrbox.core.validation import check, check_count
from attrbox.engine.calling import forward
from attrbox.errors import InputError, ModelError

ModelFactory: TypeAlias = Callable[[], nn.Module]
# Trains a fresh model on images [N, ...] and labels [N]; what it returns, if not None, is the trained model.
TrainFunction: TypeAlias = Callable[[nn.Module, Tensor, Tensor, int], nn.Module | None]


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Adam with a one-cycle learning rate (Smith 2018) on the cross-entropy; good for small nets on MNIST or CIFAR-10.

    Attributes:
        epochs: passes over the images.
        batch_size: images per step.
        learning_rate: the largest, a third of the way.
        weight_decay: decoupled from the gradient (AdamW).
        label_smoothing: share of each label that is spread over all classes.
        augment: changes a batch [n, ...] before each step; draws from torch's global random state, which is seeded.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    augment: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        check(0 < self.learning_rate < float("inf"), "learning_rate", "a positive number", self.learning_rate)
        check(0 <= self.weight_decay < float("inf"), "weight_decay", "a number >= 0", self.weight_decay)
        check(0 <= self.label_smoothing < 1, "label_smoothing", "a share from 0 to below 1", self.label_smoothing)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
        """Train the model in place, and return it in evaluation mode.

        Raises:
            ModelError: the loss is not finite.
        """
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay)
        steps = -(-len(images) // self.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, self.learning_rate, total_steps=self.epochs * steps + 1, cycle_momentum=False
        )
        generator = torch.Generator().manual_seed(mixed(seed, 0))
        for _ in range(self.epochs):
            order = torch.randperm(len(images), generator=generator).to(images.device)
            for rows in torch.split(order, self.batch_size):
                if len(rows) == 1 and len(images) > 1:
                    continue  # a batch-norm cannot learn from one image
                batch = images[rows] if self.augment is None else self.augment(images[rows])
                loss = F.cross_entropy(unwrap(model(batch)), labels[rows], label_smoothing=self.label_smoothing)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
            if not bool(loss.isfinite()):
                raise ModelError(f"The training loss is {loss.item()}. Lower the learning rate.")
        return model.eval()


def train(
    factory: ModelFactory, images: Tensor, labels: Tensor, trainer: TrainFunction | None = None, *, seed: int = 0
) -> nn.Module:
    """A model from the factory, trained on the device of the images; in evaluation mode.

    Args:
        factory: makes a new model with new weights each time.
        images: [N, ...].
        labels: classes [N].
        trainer: trains it; default: `Trainer()`.
        seed: of the weights and of the training.

    Raises:
        InputError: images and labels do not fit.
        ModelError: the factory or the trainer returned something else than a model.
    """
    check_labelled(images, labels)
    devices = [images.device.index] if images.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(mixed(seed, 1))
        model = factory()
        if not isinstance(model, nn.Module):
            raise ModelError(f"Expected the factory to make a torch.nn.Module, got {type(model).__name__}.")
        model = model.to(images.device)
        trained = (trainer or Trainer())(model, images, labels, seed)
        trained = model if trained is None else trained
        if not isinstance(trained, nn.Module):
            raise ModelError(f"Expected the trainer to return a model or None, got {type(trained).__name__}.")
    return trained.eval()


def train_on_permuted_labels(
    factory: ModelFactory, images: Tensor, labels: Tensor, trainer: TrainFunction | None = None, *, seed: int = 0
) -> nn.Module:
    """The same, with the labels permuted at random: what `label_randomization` compares with (Zhang et al. 2017)."""
    check_labelled(images, labels)
    generator = torch.Generator().manual_seed(mixed(seed, 2))
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    return train(factory, images, labels[order], trainer, seed=seed)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """The share of images [N, ...] whose largest output is their label; the model is left as it was."""
    check_labelled(images, labels)
    with untouched(model), torch.no_grad():
        hits = [
            (unwrap(forward(model, part.clone())).argmax(1) == wanted).sum()
            for part, wanted in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
        ]
    return float(torch.stack(hits).sum()) / len(images)


def check_labelled(images: Tensor, labels: Tensor) -> None:
    """Raise `InputError` unless there is one whole number for each image."""
    if labels.shape != (len(images),) or labels.is_floating_point() or len(images) == 0:
        raise InputError(
            f"Expected one class index for each of the {len(images)} images, got labels of shape "
            f"{list(labels.shape)}, {labels.dtype}."
        )

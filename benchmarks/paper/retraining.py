"""Table 1: ROAR, accuracy of models trained anew without the pixels that a method ranks highest."""

import argparse
from collections.abc import Sequence

import cifar10
from torch import Tensor

import attrbox
from attrbox.metrics.faithfulness.roar import Labelled
from attrbox.metrics.training import ModelFactory, Trainer
from paper.cases import Case, cifar, cifar_data, mnist, mnist_data, mnist_network
from paper.kept import digest
from paper.methods import Chosen
from paper.pages import figure, section


def table1(options: argparse.Namespace) -> str:
    sections = []
    if options.mnist:
        train_set, test_set = mnist_data(options.mnist)
        trainer, seeds = Trainer(epochs=options.mnist_epochs), range(options.roar_seeds)
        methods = _methods(options.roar_iterations)
        fractions = options.roar_fractions
        text = _grid(options, mnist(options), mnist_network, train_set, test_set, methods, trainer, fractions, seeds)
        sections.append(text)
    if options.cifar:
        train_set = cifar_data(options, "train")
        test_set = tuple(part[: options.roar_cifar[1]] for part in cifar_data(options, "test"))
        trainer, seeds = Trainer(epochs=options.roar_cifar_epochs), range(options.roar_cifar_seeds)
        methods = _methods(options.roar_cifar_iterations)
        fractions = options.roar_cifar_fractions
        factory = lambda: cifar10.network("cnn")  # noqa: E731
        sections.append(
            _grid(options, cifar(options), factory, train_set, test_set, methods, trainer, fractions, seeds)
        )
    return section("Table 1: ROAR, test accuracy in percent", "\n".join(sections))


def _methods(iterations: int) -> Chosen:
    return {
        "squared_smoothgrad": ("squared_smoothgrad", {"n_samples": 25}),
        "learned": ("learned", {"iterations": iterations, "keep_rules": False}),
    }


def _grid(
    options: argparse.Namespace,
    case: Case,
    factory: ModelFactory,
    train_set: Labelled,
    test_set: Labelled,
    methods: Chosen,
    trainer: Trainer,
    fractions: Sequence[float],
    seeds: Sequence[int],
) -> str:
    """One data set. The maps explain the class that the case's network predicts."""

    def maps(images: Tensor, label: str) -> Tensor:
        method, settings = methods[label]
        whole = Case(f"roar {case.name}", case.model, images, case.batch)
        return whole.heatmaps(options.kept, label, method, settings)

    both = {label: (maps(train_set[0], label), maps(test_set[0], label)) for label in methods}
    folder = options.out / "kept" / f"roar {case.name} {digest(trainer, repr(factory()), *train_set, *test_set, both)}"
    found = attrbox.roar(
        factory,
        train_set,
        test_set,
        both,
        fractions=fractions,
        seeds=list(seeds),
        trainer=trainer,
        folder=folder,
        progress=False,
    )
    path = options.out / f"table1-{case.name}"
    found.to_csv(path.with_suffix(".csv"))
    figure(path.with_suffix(".png"), lambda path: found.plot(path, dpi=90))
    heading = f"{case.name}, {len(train_set[0]):,} training and {len(test_set[0]):,} test images, {len(seeds)} seed(s)"
    return f"### {heading}\n\n{found.table()}\n\n![]({path.name}.png)\n"

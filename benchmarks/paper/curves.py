"""Figure 5: removal curves of all methods. And what every experiment with curves needs."""

import argparse
import dataclasses
from collections.abc import Mapping

from torch import Tensor

import attrbox
from attrbox.metrics.results import Evaluation
from attrbox.metrics.scores import Score
from paper.cases import Case, cifar, mnist, photograph_networks, photographs
from paper.kept import Kept
from paper.methods import GRADIENTS, LEARNED, Chosen, masks
from paper.pages import figure, section

CURVES = ("morf", "lerf")  # as published: logits over the image's own, up to 5 %, zeros in normalised space


def maps_of(case: Case, kept: Kept, chosen: Chosen) -> dict[str, Tensor]:
    """The maps of some methods."""
    return {label: case.heatmaps(kept, label, method, options) for label, (method, options) in chosen.items()}


def scores_of(case: Case, kept: Kept, maps: Mapping[str, Tensor], controls: bool = True) -> Evaluation:
    """MoRF and LeRF, beside the controls."""
    fields = [field.name for field in dataclasses.fields(Score)]

    def compute() -> dict[str, object]:
        scores = attrbox.evaluate(
            case.model,
            case.images,
            maps,
            CURVES,
            target=case.targets,
            controls=controls,
            batch_size=case.batch,
            progress=False,
        )
        plain = {
            label: {metric: {name: getattr(score, name) for name in fields} for metric, score in row.items()}
            for label, row in scores.items()
        }
        return {"scores": plain, "controls": list(scores.controls)}

    depends = (case.model, case.images, case.targets, CURVES, controls, maps)
    found = kept(f"curves {case.name} {len(case.images)}", depends, compute)
    scores = {
        label: {metric: Score(**values) for metric, values in row.items()} for label, row in found["scores"].items()
    }
    return Evaluation(scores, tuple(found["controls"]))


def fig5(options: argparse.Namespace) -> str:
    cases: list[tuple[Case, Chosen]] = []
    if options.mnist and "mnist_cnn" in options.networks:
        cases.append((mnist(options), LEARNED | GRADIENTS))
    if options.cifar:
        chosen = [name for name in options.networks if name.startswith("cifar_")]
        cases += [(cifar(options, name), LEARNED | GRADIENTS) for name in chosen]
    if options.photographs:
        for name in photograph_networks(options):
            case = photographs(options, name).first(options.photographs_count)
            cases.append((case, LEARNED | GRADIENTS | masks(options)))
    sections = []
    for case, methods in cases:
        scores = scores_of(case, options.kept, maps_of(case, options.kept, methods))
        path = options.out / f"fig5-{case.name}.png"
        figure(path, lambda path, scores=scores: scores.plot(path, dpi=90))
        scores.to_csv(options.out / f"fig5-{case.name}.csv")
        heading = f"{case.name}, {len(case.images)} images" + (f" ({case.note})" if case.note else "")
        sections.append(f"### {heading}\n\n{scores.table()}\n\n![]({path.name})\n")
    return section("Figure 5: removal curves of all methods", "\n".join(sections))

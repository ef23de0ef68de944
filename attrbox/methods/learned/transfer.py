"""Rules learned before, replayed: how far do they carry?"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrbox.core.options import REQUIRED, option
from attrbox.engine.site import Site
from attrbox.engine.tape import Tape
from attrbox.errors import ModelError, OptionError
from attrbox.methods.base import register_method
from attrbox.methods.context.run import Run
from attrbox.methods.learned.chain import Propagating, chained, prepared, regions
from attrbox.methods.learned.parameters import as_rules
from attrbox.rules.learned import LearnedRule, plugins


@register_method(
    "learned_transfer",
    summary="Rules learned before, replayed on the same images or on others",
    reference="attrbox; after Yang et al., ECCV 2020",
)
@dataclass(frozen=True, kw_only=True)
class LearnedTransfer(Propagating):
    """A = sum over channels of X * G_X under rules that were learned before.

    One rule is applied to all images; as many rules as images, to one each. Of several targets, rules fit a call
    with as many; of several restarts, the maps are averaged.
    """

    learned: Any = option(
        REQUIRED, "LearnedRules (details['rules'] of a learned map), or the path where they were saved"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "learned", as_rules(self.learned))

    @property
    def plugged(self) -> LearnedRule:
        settings = self.learned.settings
        return LearnedRule(
            plugins[settings["plugin"]].make(settings["kernel"]), settings["feature"], settings["reference"]
        )

    def together(self, run: Run) -> Tensor:
        maps = []
        for k, region in enumerate(regions(run, self.learned.settings["region"])):
            tape, rule, sites, reference = prepared(self.plugged, self.learned.settings.get("modules"), run, k)
            parameters = self._parameters(run, sites, k)
            restarts = next(iter(parameters.values())).shape[1]
            found = []
            for restart in range(restarts):
                rule.parameters = {index: values[:, restart] for index, values in parameters.items()}
                found.append(chained(run, tape, rule, reference, k, self.learned.settings["sigma"], region))
            maps.append(torch.stack(found).mean(0))
        return torch.stack(maps, 1)

    def learned_at(self, tape: Tape) -> list[Site]:
        return [site for site in tape.sites if site.name in self.learned.parameters]

    def _parameters(self, run: Run, sites: list[Site], k: int) -> dict[int, Tensor]:
        """Parameters by site, [1 or n, R, ...]."""
        learned, total = self.learned, run.settings.target.samples
        if len(learned) not in (1, total):
            raise OptionError(
                f"Expected one learned rule, or one per image, {total} in all, got {len(learned)}. "
                "Choose some with rules[[0, 3]], or take their mean with rules.average()."
            )
        by_name = {site.name: site.index for site in sites}
        if unknown := sorted(set(learned.parameters) - set(by_name)):
            raise ModelError(
                f"The learned rules belong to another model: it has no non-linearity {', '.join(unknown[:3])}. "
                f"It has {', '.join(list(by_name)[:3])}, ..."
            )
        if missing := sorted(set(by_name) - set(learned.parameters)):
            raise ModelError(
                f"The learned rules lack {len(missing)} of the {len(by_name)} non-linearities of this model, "
                f"{', '.join(missing[:3])}, so they would make another map than the one that they were learned with. "
                "Learn them anew, for this model and these targets."
            )
        rows = slice(None) if len(learned) == 1 else run.rows
        targets = next(iter(learned.parameters.values())).shape[1]
        if targets not in (1, run.scores.shape[1]):
            raise OptionError(f"Expected rules of one target or of {run.scores.shape[1]}, got {targets}.")
        column = k if targets > 1 else 0
        return {by_name[name]: values[rows, column].to(run.images) for name, values in learned.parameters.items()}

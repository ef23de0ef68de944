"""PatternNet and PatternAttribution, and the patterns that they propagate: fitted once per model by `fit_patterns`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from attrbox.core.hashing import architecture_hash, known_weights_hash
from attrbox.core.options import REQUIRED, option
from attrbox.core.tensor_files import read_tensors, write_tensors
from attrbox.core.validation import check_flag
from attrbox.engine.site import LAYERS, LayerInfo, Rule, Site
from attrbox.engine.tape import Tape
from attrbox.errors import ModelError, OptionError, shown
from attrbox.methods.base import Method, register_method
from attrbox.methods.context.run import Run
from attrbox.rules.pattern_attribution import PatternRule, Place

_KIND = "patterns"
_PATTERNS = "Patterns (attrbox.fit_patterns(model, images)), or the path where they were saved"


class LayerNames:
    """Layers of a recorded pass as patterns name them: by `Site.name`, with "+norm" behind it if a batch-norm is
    joined to the layer."""

    def __init__(self, tape: Tape) -> None:
        self._names = {site.index: site.name for site in tape.sites if site.kind in LAYERS}

    def __getitem__(self, site: Site) -> str:
        return self._names[site.index] + ("+norm" if site.about(LayerInfo).joined else "")

    def places(self) -> dict[str, Place]:
        """Where each name is, with and without a batch-norm."""
        return {
            name + ("+norm" if joined else ""): (index, joined)
            for index, name in self._names.items()
            for joined in (False, True)
        }


@dataclass(frozen=True, eq=False)
class Patterns:
    """The directions of the signals at a model's layers.

    Attributes:
        values: layer -> a, of the shape of its weights (times those of its batch-norm).
        settings: `estimator`, the number of `images`, `weights_sha256` and `architecture_sha256` of the model, and
            `sha256` of the values.
    """

    values: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    @property
    def silent(self) -> dict[str, int]:
        """Neurons of each layer that never fired on the data, or never changed: their pattern is 0."""
        counts = {name: int((a.reshape(len(a), -1) == 0).all(1).sum()) for name, a in self.values.items()}
        return {name: count for name, count in counts.items() if count}

    def check(self, model: nn.Module) -> None:
        """Raise unless they were fitted to this model.

        Raises:
            ModelError: its weights or modules are others.
        """
        found = {"weights": known_weights_hash(model), "architecture": architecture_hash(model)}
        if other := [name for name, sha256 in found.items() if sha256 != self.settings[f"{name}_sha256"]]:
            raise ModelError(
                f"The patterns were fitted to a model of other {' and '.join(other)} than this one. Fit them anew: "
                "attrbox.fit_patterns(model, images)."
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, which holds tensors and text only; an existing one is replaced as a whole.

        Raises:
            FileError: the file cannot be written.
        """
        return write_tensors(path, self.values, self.settings, _KIND)

    @classmethod
    def load(cls, path: str | Path) -> "Patterns":
        """Read what `save` wrote.

        Raises:
            FileError: there is no such file, or it holds no patterns.
        """
        return cls(*read_tensors(path, _KIND))

    def __repr__(self) -> str:
        return f"<Patterns {len(self.values)} layers; {self.settings}>"


def _as_patterns(value: object) -> Patterns:
    if isinstance(value, Patterns):
        return value
    if isinstance(value, str | Path):
        return Patterns.load(value)
    raise OptionError(f"Expected patterns to be {_PATTERNS}, got {shown(value)}.")


@dataclass(frozen=True, kw_only=True)
class _ByPatterns(Method):
    patterns: Any = option(REQUIRED, _PATTERNS)
    times_score: bool = option(False, "multiply by the score: the signal itself, rather than its direction")

    weighted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_flag("times_score", self.times_score)
        object.__setattr__(self, "patterns", _as_patterns(self.patterns))

    @property
    def rules(self) -> tuple[Rule | None, ...]:
        return (PatternRule({}, self.weighted),)

    def attribute(self, run: Run) -> Tensor:
        self.patterns.check(run.model)
        values = run.gradient(PatternRule(self._by_place(run.tape), self.weighted))
        scale = run.scores.view(*run.scores.shape, *(1,) * (values.dim() - 2))
        return values * scale if self.times_score else values

    def _by_place(self, tape: Tape) -> dict[Place, Tensor]:
        places = LayerNames(tape).places()
        if unknown := sorted(set(self.patterns.values) - set(places)):
            raise ModelError(
                f"The model did not run the layers {', '.join(unknown[:3])}, which it ran when the patterns were "
                "fitted: its control flow depends on its input, so no pattern is defined."
            )
        return {places[name]: values for name, values in self.patterns.values.items()}


@register_method(
    "pattern_net",
    summary="Signal that the score is about: patterns fitted to data in place of weights",
    reference="Kindermans et al., ICLR 2018, section 5",
    units="input per score",
)
@dataclass(frozen=True, kw_only=True)
class PatternNet(_ByPatterns):
    """The gradient with patterns in place of weights; times the score, the signal in the image."""


@register_method(
    "pattern_attribution",
    summary="Relevance along the signal: weights times patterns fitted to data",
    reference="Kindermans et al., ICLR 2018, section 5",
)
@dataclass(frozen=True, kw_only=True)
class PatternAttribution(_ByPatterns):
    """The gradient with weights times patterns in place of weights, times the score."""

    times_score: bool = option(True, "multiply by the score: relevance, rather than its shares")

    weighted: ClassVar[bool] = True

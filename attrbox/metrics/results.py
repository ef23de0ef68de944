"""What `evaluate` returns: scores by method and metric, with tables, tests and a figure."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attrbox.core.atomic_files import whole_file
from attrbox.errors import OptionError, UnknownNameError, near_miss
from attrbox.metrics.figures import plot_scores
from attrbox.metrics.scores import Score, as_array
from attrbox.metrics.statistics import Paired, paired_tests


@dataclass(frozen=True, eq=False)
class Evaluation(Mapping[str, Mapping[str, Score]]):
    """Scores by method, then metric: `scores["deeplift"]["morf"].mean`.

    Attributes:
        scores: method -> metric -> score, in the order asked for; the controls come last.
        controls: which of the methods are controls.
    """

    scores: Mapping[str, Mapping[str, Score]]
    controls: tuple[str, ...] = ()

    def __getitem__(self, label: str) -> Mapping[str, Score]:
        if label not in self.scores:
            raise UnknownNameError(f"No scores of {label!r}. {near_miss(label, self.scores)}")
        return self.scores[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The labels of the metrics."""
        return tuple(next(iter(self.scores.values())))

    def by_metric(self, metric: str) -> dict[str, Score]:
        """The scores of all methods by one metric.

        Raises:
            UnknownNameError: it was not measured.
        """
        if metric not in self.metrics:
            raise UnknownNameError(f"No scores by {metric!r}. {near_miss(metric, self.metrics)}")
        return {label: scores[metric] for label, scores in self.scores.items()}

    def tests(self, metric: str) -> list[Paired]:
        """Wilcoxon's signed-rank test of each pair of methods by one metric, with Holm's correction for all of them."""
        return paired_tests({label: as_array(score.values) for label, score in self.by_metric(metric).items()})

    def best(self, metric: str) -> tuple[str, ...]:
        """The methods with the best mean, and those that are not significantly worse (p >= 0.05 after correction).

        The best comes first; none if no method has a mean.
        """
        scores = self.by_metric(metric)
        sign = 1 if next(iter(scores.values())).better == "higher" else -1
        ranked = sorted((s for s in scores.items() if s[1].mean == s[1].mean), key=lambda s: -sign * s[1].mean)
        if not ranked:
            return ()
        first = ranked[0][0]
        alike = {
            pair.second if pair.first == first else pair.first
            for pair in self.tests(metric)
            if first in (pair.first, pair.second) and pair.adjusted >= 0.05
        }
        return (first, *(label for label, _ in ranked[1:] if label in alike))

    def table(self, digits: int = 3) -> str:
        """Methods by metrics as a Markdown table: mean, 95 % interval, and how many samples were left out.

        An arrow says where better is. The best is bold; what is not significantly worse is in italics. Below are the
        notes of the scores.
        """
        arrows = {"higher": "↑", "lower": "↓"}
        by_metric = {metric: self.by_metric(metric) for metric in self.metrics}
        headers = [f"{metric} {arrows[next(iter(scores.values())).better]}" for metric, scores in by_metric.items()]
        lines = ["| " + " | ".join(["method", *headers]) + " |", "|---|" + "---:|" * len(headers)]
        best = {metric: self.best(metric) for metric in self.metrics}
        for label in self.scores:
            cells = [_cell(scores[label], _mark(label, best[metric]), digits) for metric, scores in by_metric.items()]
            name = f"{label} (control)" if label in self.controls else label
            lines.append("| " + " | ".join([name, *cells]) + " |")
        return "\n".join([*lines, *self._notes()])

    def _notes(self) -> list[str]:
        """What metrics have to say of their scores, a line for all methods of which they say the same."""
        said: dict[tuple[str, str], list[str]] = {}
        for label, scores in self.scores.items():
            for metric, score in scores.items():
                if score.note:
                    said.setdefault((metric, score.note), []).append(label)
        lines = [f"{metric} of {', '.join(labels)}: {note}." for (metric, note), labels in said.items()]
        return ["", *lines] if lines else []

    def rows(self) -> list[dict[str, Any]]:
        """One record per method and metric: what `to_csv` writes."""
        return [
            {
                "method": label,
                "metric": metric,
                "better": score.better,
                "mean": score.mean,
                "low": score.interval[0],
                "high": score.interval[1],
                "samples": int((~score.left_out).sum()),
                "left_out": int(score.left_out.sum()),
            }
            for label, scores in self.scores.items()
            for metric, score in scores.items()
        ]

    def to_csv(self, path: str | Path, *, samples: bool = False) -> Path:
        """Write the scores as a table: one row per method and metric or, with `samples`, per sample of these too.

        Raises:
            FileError: the file cannot be written.
        """
        rows = self.rows()
        if samples:
            rows = [
                {"method": label, "metric": metric, "sample": sample, "value": value}
                for label, scores in self.scores.items()
                for metric, score in scores.items()
                for sample, value in enumerate(score.values.tolist())
            ]
        write_csv(path, rows)
        return Path(path)

    def plot(self, path: str | Path | None = None, **options: Any) -> Any:
        """All methods in one figure, a panel per metric; see `attrbox.metrics.figures.plot_scores`."""
        return plot_scores(self.scores, self.controls, path, **options)

    def __repr__(self) -> str:
        return f"<Evaluation of {len(self)} methods\n{self.table()}\n>"


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Records of the same names as a CSV file, whole or not at all.

    Raises:
        OptionError: there are none.
        FileError: the file cannot be written.
    """
    if not rows:
        raise OptionError("Expected at least one row to write, got none.")
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _mark(label: str, best: Sequence[str]) -> str:
    return "" if label not in best else "**" if label == best[0] else "*"


def _cell(score: Score, mark: str, digits: int) -> str:
    low, high = score.interval
    mean = f"{score.mean:.{digits}f}"
    left = int(score.left_out.sum())
    note = f" ({left} left out)" if left else ""
    return f"{mark}{mean}{mark} [{low:.{digits}f}, {high:.{digits}f}]{note}"

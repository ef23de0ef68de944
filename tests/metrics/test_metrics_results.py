"""Statistics, tables, files and figures."""

import csv
import math

import numpy as np
import pytest
import torch
from scipy import stats

from attrbox.errors import FileError, OptionError, UnknownNameError
from attrbox.metrics import statistics
from attrbox.metrics.base import Measurement
from attrbox.metrics.results import Evaluation
from attrbox.metrics.scores import Score
from attrbox.metrics.statistics import bootstrap_interval, grouped_mean, holm, paired_tests

NAN = math.nan


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


def test_the_interval_of_normal_numbers_is_that_of_theory():
    values = normal(400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.015)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_interval_covers_the_mean_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(normal(60, seed), seed=seed, n_samples=500)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 200 <= 0.98


def test_nan_is_left_out_and_groups_count_alike():
    values = np.array([1.0, NAN, 3.0, 10.0])
    groups = np.array([4, 4, 4, 9])
    assert grouped_mean(values) == pytest.approx(14 / 3)
    assert grouped_mean(values, groups) == pytest.approx((2 + 10) / 2)
    low, high = bootstrap_interval(values, groups)
    assert (low, high) == pytest.approx(((1 + 10) / 2, (3 + 10) / 2))
    assert math.isnan(grouped_mean(np.full(3, NAN)))
    assert all(map(math.isnan, bootstrap_interval(np.full(3, NAN))))


def test_large_samples_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr(statistics, "_AT_ONCE", 1000)
    low, high = bootstrap_interval(normal(300))
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(300), rel=0.15)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    adjusted = holm([0.02, NAN, 0.01])
    assert adjusted[0] == pytest.approx(0.02)
    assert math.isnan(adjusted[1])
    assert adjusted[2] == pytest.approx(0.02)


def test_paired_tests_agree_with_scipy():
    a, b = normal(30), normal(30, 1) + 0.8
    a[3] = NAN
    ab, ac, bc = paired_tests({"a": a, "b": b, "c": a})
    both = ~np.isnan(a)
    wanted = stats.wilcoxon(a[both], b[both]).pvalue
    assert (ab.first, ab.second, ab.samples) == ("a", "b", 29)
    assert ab.p == pytest.approx(wanted)
    assert ab.adjusted == pytest.approx(min(1, 3 * wanted))
    assert ab.difference == pytest.approx((a - b)[both].mean())
    assert ac.p == ac.adjusted == 1  # nothing differs
    assert bc.difference == pytest.approx(-ab.difference)
    (empty,) = paired_tests({"a": np.array([NAN, 1]), "b": np.array([1, NAN])})
    assert empty.samples == 0
    assert math.isnan(empty.p)


# ------------------------------------------------------------------------------------------------------------- results


def score(values, better="lower", curves=None, **options) -> Score:
    values = torch.as_tensor(values, dtype=torch.float64)
    positions = None if curves is None else torch.linspace(0, 1, curves.shape[1], dtype=torch.float64)
    return Score(metric="m", values=values, better=better, options={}, curves=curves, fractions=positions, **options)


def evaluation() -> Evaluation:
    base = torch.from_numpy(normal(20))
    curve = torch.linspace(1, 0, 4, dtype=torch.float64).expand(20, -1)
    return Evaluation(
        {
            "good": {"down": score(base, curves=curve), "up": score(base + 9, "higher")},
            "close": {
                "down": score(base + 0.01 * torch.from_numpy(normal(20, 1)), curves=curve),
                "up": score(base, "higher"),
            },
            "bad": {"down": score(base + 5, curves=curve + 1), "up": score(base, "higher")},
            "random": {"down": score([NAN, *(base[1:] + 3)], curves=curve + 0.5), "up": score([NAN] * 20, "higher")},
        },
        ("random",),
    )


def test_the_best_and_what_is_not_significantly_worse():
    both = evaluation()
    assert set(both.best("down")) == {"good", "close"}
    assert both.best("up") == ("good",)
    lines = both.table(2).splitlines()
    assert lines[0] == "| method | down ↓ | up ↑ |"
    rows = {line.split(" | ")[0].strip("| "): line for line in lines[2:]}
    assert list(rows) == ["good", "close", "bad", "random (control)"]
    first = both.best("down")[0]
    assert f"| **{both[first]['down'].mean:.2f}** [" in rows[first]
    second = both.best("down")[1]
    assert f"| *{both[second]['down'].mean:.2f}* [" in rows[second]
    assert "*" not in rows["bad"]
    assert "(1 left out)" in rows["random (control)"]
    assert "nan [nan, nan] (20 left out)" in rows["random (control)"]
    low, high = both["good"]["up"].interval
    assert f"[{low:.2f}, {high:.2f}]" in rows["good"]


def test_csv_of_means_and_of_samples(tmp_path):
    both = evaluation()
    rows = list(csv.DictReader(both.to_csv(tmp_path / "means.csv").read_text().splitlines()))
    assert len(rows) == 8
    assert float(rows[0]["mean"]) == both["good"]["down"].mean
    assert (rows[6]["samples"], rows[6]["left_out"], rows[6]["better"]) == ("19", "1", "lower")
    rows = list(csv.DictReader(both.to_csv(tmp_path / "samples.csv", samples=True).read_text().splitlines()))
    assert len(rows) == 160
    assert [float(row["value"]) for row in rows[:20]] == both["good"]["down"].values.tolist()


def test_figure_has_a_panel_for_each_metric_and_all_methods_in_each(tmp_path):
    figure = evaluation().plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    curves, dots = figure.axes
    drawn = [line for line in curves.lines if len(line.get_xdata()) == 4]
    assert len(drawn) == 4
    assert drawn[2].get_ydata() == pytest.approx(np.linspace(2, 1, 4))
    assert [label.get_text() for label in dots.get_yticklabels()] == ["good", "close", "bad", "random"]
    assert drawn[3].get_color() == "#777777"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["good", "close", "bad", "random"]
    evaluation().plot(tmp_path / "one.svg", columns=1)
    with pytest.raises(FileError, match=r"\.xyz"):
        evaluation().plot(tmp_path / "figure.xyz")
    with pytest.raises(OptionError, match="columns"):
        evaluation().plot(columns=0)


def test_more_methods_than_colours_differ_by_their_lines():
    scores = {f"m{k}": {"a": score([0.0, 1.0], curves=torch.zeros(2, 3))} for k in range(23)}
    figure = Evaluation(scores).plot()
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 23


def test_what_is_not_there():
    both = evaluation()
    with pytest.raises(UnknownNameError, match="Did you mean 'good'"):
        both["godo"]
    with pytest.raises(UnknownNameError, match="Did you mean 'down'"):
        both.tests("dwon")
    with pytest.raises(AttributeError, match="has no curve"):
        _ = both["good"]["up"].auc
    assert both["good"]["up"].mean_curve is None
    assert "20 samples" in repr(both["good"]["up"])
    assert "| good |" in repr(both)
    assert len(both) == 4


def test_chunks_are_joined():
    parts = [
        Measurement(
            values=torch.tensor([first]),
            curves=torch.tensor([[first, 2.0]]),
            fractions=torch.tensor([0.0, 1.0]),
            groups=torch.tensor([3]),
            details={"d": torch.tensor([first + 4])},
        )
        for first in (1.0, 2.0)
    ]
    joined = Score.joined(parts, metric="m", better="lower", options={})
    assert joined.values.tolist() == [1, 2]
    assert joined.curves.tolist() == [[1, 2], [2, 2]]
    assert joined.groups.tolist() == [3, 3]
    assert joined.details["d"].tolist() == [5, 6]
    assert joined.fractions.tolist() == [0, 1]

"""One self-contained HTML page about a file of maps: gallery, overlays, filters, curves and tables of stored scores.

The page needs no network. Whatever a file says reaches it as text: JSON that the page's script reads, or HTML that the
template escapes; and its content policy lets no script run but the page's own.
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import rankdata

from attrbox.core.atomic_files import whole_file
from attrbox.core.renaming import renamed_arguments
from attrbox.data.maps.reader import MapsFile, open_maps
from attrbox.errors import InputError
from attrbox.metrics.results import Evaluation
from attrbox.pipeline.stored_scores import read_scores
from attrbox.visualization.colors import PERCENTILE

_PAGE = Path(__file__).with_name("page_files")
_LINES = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22", "#444444")


@renamed_arguments(samples="n_samples")
def write_report(
    path: str | Path, out: str | Path, *, n_samples: int = 48, side: int = 112, title: str | None = None
) -> Path:
    """Write a page about a file of maps.

    Args:
        path: the file.
        out: the page; a file that is there is replaced.
        n_samples: at most so many are shown, evenly spread over those that have a map.
        side: larger maps are averaged down to this many pixels a side.
        title: of the page; default: the file's name.

    Returns:
        The page's path.

    Raises:
        FileError: the file cannot be read, or the page not be written.
        InputError: the maps are not of images, or there are none.
    """
    with open_maps(path) as maps:
        evaluation = read_scores(maps)
        page = _page(maps, evaluation, n_samples, side, title or maps.path.name)
    with whole_file(out) as part:
        part.write_text(page, encoding="utf-8")
    return Path(out)


def _page(maps: MapsFile, evaluation: Evaluation | None, n_samples: int, side: int, title: str) -> str:
    style, script = ((_PAGE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    templates = Environment(loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined)
    return templates.get_template("page.html").render(
        title=title,
        facts=_facts(maps),
        scores=None if evaluation is None else _scores(evaluation),
        charts=[] if evaluation is None else [chart for m in evaluation.metrics if (chart := _chart(m, evaluation))],
        methods=_methods(maps),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=Markup(_embedded(_data(maps, evaluation, n_samples, side))),
    )


# ------------------------------------------------------------------------------------------------------------ the data


def _data(maps: MapsFile, evaluation: Evaluation | None, n_samples: int, side: int) -> dict[str, Any]:
    for label, one in maps.items():
        if len(one.shape) < 4:
            raise InputError(f"Expected maps of images, [N, C, H, W], got {list(one.shape)} for {label!r}.")
    done = {label: one.done for label, one in maps.items()}
    some = np.flatnonzero(np.logical_or.reduce(list(done.values())))
    if not len(some):
        raise InputError(f"{str(maps.path)!r} has no map yet. Go on with the export first.")
    rows = some[np.unique(np.linspace(0, len(some) - 1, min(n_samples, len(some))).round().astype(int))]
    failed = {label: one.failed for label, one in maps.items()}
    columns = {name: maps.column(name) for name in ("label", "target", "prediction", "score", "source")}
    entries = []
    for place in (int(row) for row in rows):
        small = {label: _heatmap(maps, label, place, side) for label in maps if done[label][place]}
        name = maps.ids[place]
        entries.append(
            {
                "id": name,
                "place": place,
                "maps": {label: _png(heatmap) for label, heatmap in small.items()},
                "photograph": _photograph(maps, place),
                "failed": {label: reasons[name] for label, reasons in failed.items() if reasons.get(name)},
                "disagreement": _disagreement(list(small.values())),
                "scores": _scores_of(evaluation, place),
                **_known(maps, columns, place),
            }
        )
    return {"methods": list(maps), "metrics": list(evaluation.metrics) if evaluation else [], "samples": entries}


def _known(maps: MapsFile, columns: Mapping[str, NDArray[Any] | None], place: int) -> dict[str, Any]:
    """What the file knows of a sample, for the eye and for sorting."""
    value = {name: None if column is None else column[place] for name, column in columns.items()}
    target = value["target"]
    first = None if target is None else np.ravel(target)[0]
    score = None if value["score"] is None else float(np.ravel(value["score"])[0])
    explained, predicted = _class(maps, first), _class(maps, value["prediction"])
    true = -1 if maps.labeled is None else int(maps.labeled[place])
    facts = [
        ("label", _text(value["label"]) if true < 0 else ""),
        ("true class", maps.class_name(true)),
        ("predicted", predicted),
        ("explained", explained),
        ("score", "" if score is None else f"{score:.4g}"),
    ]
    return {
        "class": explained,
        "score": score if score is None or np.isfinite(score) else None,
        "wrong": true >= 0 and value["prediction"] is not None and true != int(value["prediction"]) >= 0,
        "facts": [(name, text) for name, text in facts if text],
    }


def _text(label: Any) -> str:
    """A label that is no class of the model."""
    if isinstance(label, float):
        return f"{label:.4g}" if np.isfinite(label) else ""
    return label if isinstance(label, str) else ""


def _class(maps: MapsFile, value: Any) -> str:
    return "" if value is None else maps.class_name(int(value))


def _heatmap(maps: MapsFile, label: str, place: int, side: int) -> NDArray[Any]:
    """A map for the eye, of the first target, averaged down, [h, w]."""
    one = maps[label]
    values = one[place].float()
    values = values[0] if values.dim() > 3 else values
    heatmap = values.amax(0) if one.attributes.get("reduction") == "max" else values.sum(0)
    height, width = heatmap.shape
    factor = min(1, side / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    small: NDArray[Any] = torch.nn.functional.adaptive_avg_pool2d(heatmap[None, None], size)[0, 0].numpy()
    return small


def _png(heatmap: NDArray[Any]) -> str:
    """The values from -1 to 1, in units of their own percentile, as grey levels from 1 to 255; 128 is zero."""
    limit = float(np.percentile(np.abs(heatmap), PERCENTILE)) or float(np.abs(heatmap).max()) or 1.0
    levels = (np.clip(heatmap / limit, -1, 1) * 127 + 128).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return _uri("image/png", file.getvalue())


def _photograph(maps: MapsFile, place: int) -> str:
    content = maps.photograph(place)
    if content.startswith(b"\xff\xd8\xff"):
        return _uri("image/jpeg", content)
    return _uri("image/png", content) if content.startswith(b"\x89PNG") else ""


def _disagreement(heatmaps: Sequence[NDArray[Any]]) -> float | None:
    """1 - the mean rank correlation over pairs of maps of one size; None if there are no pairs."""
    sizes = {heatmap.shape for heatmap in heatmaps}
    varied = [heatmap for heatmap in heatmaps if np.ptp(heatmap) > 0]
    if len(varied) < 2 or len(sizes) > 1:
        return None
    ranks = np.corrcoef(np.stack([rankdata(heatmap.ravel()) for heatmap in varied]))
    return float(1 - ranks[np.triu_indices(len(varied), 1)].mean())


def _scores_of(evaluation: Evaluation | None, place: int) -> dict[str, dict[str, float]]:
    if evaluation is None:
        return {}
    found = {
        metric: {label: float(scores[metric].values[place]) for label, scores in evaluation.items()}
        for metric in evaluation.metrics
    }
    return {m: {label: value for label, value in one.items() if np.isfinite(value)} for m, one in found.items()}


# ------------------------------------------------------------------------------------------------------------ the HTML


def _facts(maps: MapsFile) -> list[str]:
    attributes = maps.attributes
    facts = [f"{maps.samples} samples, {len(maps)} methods"]
    facts += [f"model {attributes['model']}"] if "model" in attributes else []
    facts += [f"weights {str(attributes['weights_sha256'])[:12]}"] if "weights_sha256" in attributes else []
    return [*facts, f"created {attributes.get('created', '')} by attrbox {attributes.get('attrbox', '')}"]


def _methods(maps: MapsFile) -> dict[str, Any]:
    told = ("summary", "reference", "coverage")
    rows = [
        [
            label,
            *(one.attributes.get(name, "") for name in told),
            ", ".join(f"{name}={value}" for name, value in one.options.items()),
            f"{int(one.done.sum())} of {maps.samples}",
        ]
        for label, one in maps.items()
    ]
    return {
        "header": ["method", "map", "source", "non-linear operations", "options", "samples"],
        "rows": rows,
        "best": set(),
    }


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    """Means with intervals; `best` are the cells (row, column) of the best method of each metric."""
    metrics = evaluation.metrics
    arrows = {"higher": "↑", "lower": "↓"}
    best = {metric: (*evaluation.best(metric), "")[0] for metric in metrics}
    rows = [
        [
            f"{label} (control)" if label in evaluation.controls else label,
            *(
                f"{one.mean:.3f} [{one.interval[0]:.3f}, {one.interval[1]:.3f}]"
                for one in map(scores.get, metrics)
                if one
            ),
        ]
        for label, scores in evaluation.items()
    ]
    first = next(iter(evaluation))
    return {
        "header": ["method", *(f"{metric} {arrows[evaluation.by_metric(metric)[first].better]}" for metric in metrics)],
        "rows": rows,
        "best": {
            (row, column)
            for row, label in enumerate(evaluation)
            for column, metric in enumerate(metrics, 1)
            if label == best[metric]
        },
    }


def _chart(metric: str, evaluation: Evaluation) -> dict[str, Any] | None:
    """The mean curves of all methods, in the units of the drawing; None if the metric has none."""
    scores = {label: score for label, score in evaluation.by_metric(metric).items() if score.curves is not None}
    lines = {
        label: (np.asarray(score.fractions), np.asarray(score.mean_curve))
        for label, score in scores.items()
        if score.fractions is not None and bool((~score.left_out).any())
    }
    if not lines:
        return None
    xs = np.concatenate([x for x, _ in lines.values()])
    ys = np.concatenate([y for _, y in lines.values()])
    left, right, low, high = xs.min(), xs.max(), np.nanmin(ys), np.nanmax(ys)
    width, height = max(right - left, 1e-12), max(high - low, 1e-12)

    def points(x: NDArray[Any], y: NDArray[Any]) -> str:
        places = ((50 + 400 * (a - left) / width, 230 - 200 * (b - low) / height) for a, b in zip(x, y, strict=True))
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in places if np.isfinite(b))

    return {
        "metric": metric,
        "axis": next(iter(scores.values())).axis,
        "left": f"{left:.3g}",
        "right": f"{right:.3g}",
        "grid": [(230 - 50 * quarter, f"{low + quarter / 4 * height:.3g}") for quarter in range(5)],
        "lines": [
            {
                "label": label,
                "points": points(x, y),
                "color": _LINES[index % len(_LINES)],
                "dash": "4 3" if index >= len(_LINES) else "none",
                "y": 28 + 13 * index,
            }
            for index, (label, (x, y)) in enumerate(lines.items())
        ],
        "height": max(265, 40 + 13 * len(lines)),
    }


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _embedded(value: Any) -> str:
    """JSON that no HTML parser reads as a tag or a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

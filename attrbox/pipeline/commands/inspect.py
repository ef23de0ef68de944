"""`attrbox inspect`: what a file of maps holds."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attrbox.pipeline.commands.options import AsJson, MapsPath, say, say_json

if TYPE_CHECKING:
    from attrbox.data.maps.reader import MapsFile


def inspect(
    file: MapsPath,
    check: Annotated[bool, typer.Option("--verify", help="Read every map and compare checksums.")] = False,
    config: Annotated[bool, typer.Option("--config", help="Print the config that led to the file, alone.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a file of maps holds: model, methods with their options, samples, what is done and what failed.

    Exit status 1 if --verify finds damage, 2 if the file cannot be read.

    Examples: `attrbox inspect maps.h5`, `attrbox inspect maps.h5 --verify --json`
    """
    from attrbox.data.maps.merge import verify
    from attrbox.data.maps.reader import open_maps

    with open_maps(file) as maps:
        if config:
            say(str(maps.attributes.get("config", "")))
            return
        record = _record(maps)
    if check:
        record["damage"] = verify(file)
    if as_json:
        say_json(record)
    else:
        say(_text(record))
    if record.get("damage"):
        raise typer.Exit(1)


def _record(maps: "MapsFile") -> dict[str, Any]:
    known = ("schema", "created", "attrbox", "torch", "model", "weights_sha256")
    attributes = maps.attributes
    return {
        "path": str(maps.path),
        "bytes": maps.path.stat().st_size,
        **{
            name: attributes[name].item() if name == "schema" else attributes[name]
            for name in known
            if name in attributes
        },
        "samples": maps.samples,
        **_classes(maps),
        "settings": maps.settings,
        "resumed": json.loads(attributes.get("resumed", "[]")),
        "methods": {
            label: {
                "method": one.method,
                "options": one.options,
                "shape": list(one.shape),
                "dtype": str(one.dtype),
                "coverage": one.attributes.get("coverage", ""),
                "done": int(one.done.sum()),
                "failed": {name: reason for name, reason in one.failed.items() if reason},
            }
            for label, one in maps.items()
        },
        "scores": sorted({metric for one in maps.file["scores"].values() for metric in one})
        if "scores" in maps.file
        else [],
    }


def _classes(maps: "MapsFile") -> dict[str, Any]:
    """How many samples there are of each class, true, predicted and explained, and how many predictions are true."""
    import numpy as np

    columns = {"true": maps.labeled, "predicted": maps.column("prediction"), "explained": maps.column("target")}
    counts: dict[str, Any] = {}
    for name, column in columns.items():
        if column is not None:
            values, times = np.unique(column[column >= 0], return_counts=True)
            order = np.argsort(-times, kind="stable")
            counts[name] = {maps.class_name(int(values[i])): int(times[i]) for i in order}
    true, predicted = columns["true"], columns["predicted"]
    if true is not None and predicted is not None:
        both = (true >= 0) & (predicted >= 0)
        counts["misclassified"] = int((true != predicted)[both].sum())
    return {"classes": counts}


def _text(record: dict[str, Any]) -> str:
    lines = [f"{record['path']}: {record['samples']} samples, {record['bytes'] / 2**20:.1f} MiB"]
    for name in ("created", "attrbox", "torch", "model", "weights_sha256"):
        if name in record:
            lines.append(f"  {name}: {record[name]}")
    for name in ("target", "seed", "batch_size", "precision", "channels"):
        if name in record["settings"]:
            lines.append(f"  {name}: {record['settings'][name]}")
    for name, counts in record["classes"].items():
        if isinstance(counts, int):
            lines.append(f"  {name}: {counts}")
        elif counts:
            few = [f"{times} {which}" for which, times in list(counts.items())[:5]]
            more = [f"{len(counts) - 5} more classes"] if len(counts) > 5 else []
            lines.append(f"  {name}: {', '.join([*few, *more])}")
    for label, one in record["methods"].items():
        options = ", ".join(f"{name}={value}" for name, value in one["options"].items())
        lines.append(f"{label}: {one['done']} of {record['samples']} done, {one['shape']} {one['dtype']}")
        lines += [f"  options: {options}"] if options else []
        lines += [f"  coverage: {one['coverage']}"] if one["coverage"] else []
        failed = list(one["failed"].items())
        lines += [f"  no map of {name!r}: {reason}" for name, reason in failed[:5]]
        lines += [f"  ... nor of {len(failed) - 5} more"] if len(failed) > 5 else []
    lines += [f"scores: {', '.join(record['scores'])}"] if record["scores"] else []
    if "damage" in record:
        lines += [f"DAMAGED: {problem}" for problem in record["damage"]] or ["verified: every map is what was written"]
    return "\n".join(lines)

"""Speed and memory of the learned rule, in units of a native forward and backward pass of the same batch.

    python benchmarks/learned.py                              all tables, as Markdown
    python benchmarks/learned.py --keep-pages                 as the attrbox command runs
    (`attrbox.core.memory.keep_pages`)
    python benchmarks/learned.py --tables iterations --models resnet18 --rounds 5

The cost of an iteration is the difference between a long and a short run of one call, so that what is done once (the
recorded pass, the reference, the final map) does not count; both run in every round, as in `benchmarks/engine.py`.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from engine import load, native, photographs, ratio, resident, rounds, table
from torch import Tensor, nn

import attrbox
from attrbox.core.memory import keep_pages

BATCHES = {"resnet18": 4, "vgg16": 2, "efficientnet_lite0": 4}
PRESETS = ["learned", "learned_rank", "learned_clean"]
PARTS = ["chain", "masked forward", "masked backward", "double backward", "optimiser"]
SHORT, LONG = 1, 5
FULL = 60  # iterations of a whole map
RIVALS = {"mask": 300, "smask": 800}  # iterations as published


def learning(model: nn.Module, images: Tensor, preset: str, iterations: int) -> Callable[[], object]:
    """A call with a number of iterations."""
    options = {"target": 0, "iterations": iterations, "keep_rules": False, "progress": False}
    return lambda: attrbox.explain(model, images, preset, **options)


def iterations(models: Sequence[str], count: int) -> None:
    """One iteration of each preset, in native passes, and the seconds of a whole map."""
    print("### One iteration, in native passes (forward + input gradient of the same batch)\n")
    rows = {preset: [preset] for preset in PRESETS}
    header = ["preset"]
    for name in models:
        model, images = load(name), photographs(name, BATCHES[name])
        candidates: dict[str, Callable[[], object]] = {"native": lambda m=model, x=images: native(m, x)}
        for preset in PRESETS:
            candidates[f"{preset} short"] = learning(model, images, preset, SHORT)
            candidates[f"{preset} long"] = learning(model, images, preset, LONG)
        seconds = rounds(candidates, count)
        header.append(f"{name}, batch {len(images)} ({statistics.median(seconds['native']):.2f} s)")
        for preset in PRESETS:
            both = zip(seconds[f"{preset} short"], seconds[f"{preset} long"], strict=True)
            each = [(long - short) / (LONG - SHORT) for short, long in both]
            rows[preset].append(ratio(each, seconds["native"]))
    table(header, list(rows.values()))


def breakdown(models: Sequence[str]) -> None:
    """Where an iteration goes, by torch's profiler; less exact than `iterations`, as the profiler costs time too."""
    from torch.profiler import ProfilerActivity, profile

    print(f"### Breakdown of one iteration, in native passes (mean of {LONG})\n")
    rows = []
    for name in models:
        model, images = load(name), photographs(name, BATCHES[name])
        unit = statistics.median(rounds({"native": lambda m=model, x=images: native(m, x)}, 3)["native"])
        for preset in ("learned", "learned_clean"):
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                learning(model, images, preset, LONG)()
            micros = {event.key: event.cpu_time_total for event in profiled.key_averages()}
            shares = [micros[f"learned: {part}"] / 1e6 / LONG / unit for part in PARTS]
            rows.append([name, preset, *(f"{share:.2f}" for share in shares), f"{sum(shares):.2f}"])
    table(["model", "preset", *PARTS, "sum"], rows)


def measure_peak(name: str, batch: int, preset: str) -> None:
    """In a process of its own: how far the resident set grows over two iterations."""
    model, images = load(name), photographs(name, batch)
    native(model, images[:1])
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = resident("VmRSS")
    attrbox.explain(model, images, preset, target=0, iterations=2, batch_size=batch, keep_rules=False, progress=False)
    print(resident("VmHWM") - before)


def memory(models: Sequence[str]) -> None:
    """Peak memory against the size of the batch."""
    print("### Peak memory, MiB (growth of the resident set of a fresh process; smallest of 2 runs)\n")
    sizes = (1, 2, 4, 8)
    rows = []
    for name in models:
        for preset in ("learned", "learned_clean"):
            peaks = []
            for size in sizes:
                command = [sys.executable, __file__, "--peak", preset, "--models", name, "--batch", str(size)]
                runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(2)]
                peaks.append(min(int(run.stdout.split()[-1]) for run in runs) / 2**20)
            slope = (peaks[-1] - peaks[0]) / (sizes[-1] - sizes[0])
            rows.append([name, preset, *(f"{peak:.0f}" for peak in peaks), f"{slope:.0f}"])
    table(["model", "preset", *(f"batch {size}" for size in sizes), "each further image"], rows)


def rivals(models: Sequence[str], count: int) -> None:
    """Seconds of a whole map against the other methods that optimise: a short run, and the rest at a step's cost."""
    print(f"### A whole map ({FULL} iterations) against Mask and sMask with their published settings\n")
    whole = dict.fromkeys(PRESETS, FULL) | RIVALS
    rows = []
    for name in models:
        model, images = load(name), photographs(name, 2)
        candidates: dict[str, Callable[[], object]] = {}
        for method in whole:
            options = {"keep_rules": False} if method in PRESETS else {}
            for steps in (SHORT, LONG):
                candidates[f"{method} {steps}"] = lambda m=method, s=steps, o=options, net=model, x=images: (
                    attrbox.explain(net, x, m, target=0, iterations=s, progress=False, **o)
                )
        taken = rounds(candidates, count)
        seconds = {
            method: [
                short + (full - SHORT) * (long - short) / (LONG - SHORT)
                for short, long in zip(taken[f"{method} {SHORT}"], taken[f"{method} {LONG}"], strict=True)
            ]
            for method, full in whole.items()
        }
        row = [f"{name}, batch {len(images)}", f"{statistics.median(seconds['learned']) / len(images):.1f} s"]
        rows.append([*row, *(ratio(seconds[method], seconds["learned"]) for method in list(whole)[1:])])
    table(["model", "learned, per image", *(f"{name} / learned" for name in list(whole)[1:])], rows)


TABLES = ["iterations", "breakdown", "memory", "rivals"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*BATCHES], choices=[*BATCHES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--keep-pages", action="store_true", help="keep freed memory, as the attrbox command does")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    if options.peak:
        measure_peak(options.models[0], options.batch, options.peak)
        return
    if options.keep_pages:
        keep_pages()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, torch {torch.__version__}\n")
    if "iterations" in options.tables:
        iterations(options.models, options.rounds)
    if "breakdown" in options.tables:
        breakdown(options.models)
    if "memory" in options.tables:
        memory(options.models)
    if "rivals" in options.tables:
        rivals(options.models, options.rounds)


if __name__ == "__main__":
    main()

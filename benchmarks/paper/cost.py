"""The running time of the learned rule, in native passes: what carries over to another machine."""

import argparse
import platform
import statistics

import engine
import torch

import attrbox
from paper.pages import section, table

ITERATIONS, FEW = 60, 2


def cost(options: argparse.Namespace) -> str:
    rows = []
    for name in options.cost_networks:

        def measure(name: str = name) -> dict[str, float]:
            model, images = engine.load(name), engine.photographs(name, 1)

            def learn(iterations: int) -> object:
                settings = {"iterations": iterations, "keep_rules": False}
                return attrbox.explain(model, images, "learned", target=0, progress=False, **settings)

            seconds = engine.rounds(
                {
                    "native": lambda: engine.native(model, images),
                    "some": lambda: learn(FEW),
                    "more": lambda: learn(2 * FEW),
                },
                options.cost_rounds,
            )
            native, some, more = (statistics.median(seconds[key]) for key in ("native", "some", "more"))
            return {"native": native, "iteration": (more - some) / FEW, "first": some - (more - some)}

        depends = (name, options.cost_rounds, ITERATIONS, FEW, torch.get_num_threads(), torch.__version__)
        found = options.kept(f"cost {name}", depends, measure)
        whole = found["first"] + ITERATIONS * found["iteration"]
        rows.append(
            {
                "network": name,
                "native pass (s)": found["native"],
                "an iteration, in native passes": round(found["iteration"] / found["native"], 2),
                f"a map of {ITERATIONS} iterations, in native passes": round(whole / found["native"], 1),
                "the same in seconds": round(whole, 1),
            }
        )
    text = table(rows, options.out / "cost.csv") if rows else "No networks were asked for."
    where = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    return section("Running time of one map, one image of 224 x 224", f"{where}; random weights for VGG-16.\n\n{text}")

"""Random networks against every promise: maps are complete, conserved, equal in every spelling and batch.

    python benchmarks/nightly_networks.py                     10,000 networks, about half an hour on one core
    python benchmarks/nightly_networks.py --cases 500 --seed 3

A failure shrinks to a network of few steps, and is printed as a program of its own. The seed of its block runs it
again: `--seed SEED --cases 100`.
"""

import argparse
import sys
import traceback
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "tests/support"))
from network_promises import BrokenError, Case, cases, check_and_shrink

BLOCK = 100


def failure(number: int, examples: int) -> str | None:
    """What one block of networks breaks, as a program; None if all is well."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def kept(case: Case) -> None:
        check_and_shrink(case)

    try:
        kept()
    except BrokenError as error:
        return str(error)
    except Exception:  # whatever else a network brings about is as good a finding
        return traceback.format_exc()
    return None


def main() -> int:
    """Run the blocks; returns how many broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="networks")
    parser.add_argument("--seed", type=int, default=0, help="of the first block of 100")
    given_arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
    broken = 0
    with tqdm(total=given_arguments.cases, unit="network") as bar:
        for number in range(given_arguments.seed, given_arguments.seed + -(-given_arguments.cases // BLOCK)):
            found = failure(number, min(BLOCK, given_arguments.cases - bar.n))
            if found is not None:
                broken += 1
                tqdm.write(f"--- block --seed {number}\n{found}\n")
            bar.update(min(BLOCK, given_arguments.cases - bar.n))
    print(f"{given_arguments.cases} networks, {broken} blocks with a broken promise")
    return broken


if __name__ == "__main__":
    sys.exit(bool(main()))

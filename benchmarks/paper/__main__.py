"""The paper's experiments by one command: see `command.py`, and README.md for the results."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this package, and the benchmarks that it shares code with

from paper.command import main

if __name__ == "__main__":
    main()

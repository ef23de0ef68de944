"""What all tests share."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker: threads of several would fight for the same cores
    torch.set_num_threads(1)

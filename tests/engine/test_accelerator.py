"""`on_accelerator.py`, in a process of its own: it registers a device with torch, which would last."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HOOK = "_setup_privateuseone_for_python_backend"


@pytest.mark.skipif(not hasattr(backend_registration, HOOK), reason=f"this torch has no {HOOK}")
def test_everything_runs_on_a_device_with_the_values_of_the_cpu():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "on_accelerator.py"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run = subprocess.run(
        command,
        cwd=Path(__file__).parents[1] / "support",
        env=environment | one_thread,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]

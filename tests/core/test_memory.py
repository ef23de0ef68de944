"""The memory of our own programs: pages of freed tensors are kept, where the C library lets us."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
import attrbox.pipeline.cli  # all that the `attrbox` command loads before it calls keep_pages
from attrbox.core.memory import keep_pages
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64, 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults() for _ in range(6)))
"""


def faults(call: str) -> list[int]:
    program = PROGRAM.format(call=call)
    return [int(n) for n in subprocess.run([sys.executable, "-c", program], stdout=-1, check=True).stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="counts the page faults of glibc")
def test_pages_are_kept_for_the_next_tensor():
    assert faults("assert keep_pages()")[-1] < 100
    assert faults("")[-1] > 100  # importing alone changes nothing for its user

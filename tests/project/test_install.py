"""An editable install is found from every folder, also from the one in which the clone lies."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[2]
BUILD = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
# As an interpreter does at its start with the folder of installed packages; "" comes before it on the path.
LOOK = "import site, sys; site.addsitedir(sys.argv[1]); import attrbox; print(attrbox.__file__)"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with a clone called attrbox, the package cut down to a file, and a folder of installed packages."""
    parent = tmp_path_factory.mktemp("home")
    clone, wheels, packages = parent / "attrbox", parent / "wheels", parent / "packages"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        clone.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, clone)
    for folder in ("attrbox", "tests", "docs", "benchmarks", "configs"):
        (clone / folder).mkdir()
    (clone / "attrbox" / "__init__.py").touch()
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(wheels)]
    subprocess.run(command, cwd=clone, check=True, capture_output=True)
    zipfile.ZipFile(next(wheels.glob("*.whl"))).extractall(packages)
    return parent


@pytest.mark.parametrize("folder", [".", "attrbox", "attrbox/tests", "/"])
def test_an_editable_install(installed, folder):
    python = getattr(sys, "_base_executable", sys.executable)  # which has no attrbox of its own
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", LOOK, str(installed / "packages")]
    found = subprocess.run(
        command, cwd=installed / folder, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()
    assert found not in ("", "None"), "a namespace package was found, which is the clone"
    assert Path(found, "..").resolve() == installed / "attrbox" / "attrbox"

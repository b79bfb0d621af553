"""`padinv.compile`, in a process of its own: tests/isolated/compiled.py.

After its many small models any test that starts a process ended in a segmentation fault (OpenVINO 2026.4.1); a few
models, of a script or of the tests of commands, did no harm.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_in_a_process_of_its_own():
    pytest.importorskip("openvino", reason="padinv.compile needs OpenVINO")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/isolated/compiled.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "failed" not in run.stdout

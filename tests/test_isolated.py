"""Tests that use OpenVINO, each file in a process of its own.

In one process with the others, what came after them could end in a segmentation fault (OpenVINO 2026.4.1 beside torch,
on a CPU with AMX): at the first gradient step or the first process started. No small script does the same.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("isolated/bench.py", "isolated/compiled.py", "test_photos.py::test_compiled_networks_give_the_same")


@pytest.mark.parametrize("tests", TESTS)
def test_in_a_process_of_its_own(tests):
    pytest.importorskip("openvino", reason="padinv.compile needs OpenVINO")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{tests}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PADINV_ISOLATED": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout

"""Programs of the tests in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys


def run_alone(*arguments: str) -> str:
    """What Python prints with these arguments, where Triton interprets its kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout

"""compute-sanitizer over the package's kernels in a program of the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

needed = pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer"
)


def sanitized(tool: str, program: str, *arguments: object) -> str:
    """What ``tool`` says of the kernels in ``program arguments``; a finding fails the test."""
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    sanitizer = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=1"]
    command = ["--kernel-name=kns=_kernel", sys.executable, program, *map(str, arguments)]
    result = subprocess.run([*sanitizer, *command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[:3000] + result.stderr[-1000:]
    return result.stdout

"""compute-sanitizer over the package's kernels in a program of the tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

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


@contextlib.contextmanager
def workspaces_apart() -> Iterator[None]:
    """Each workspace of the delta engine is a tensor of its own, whose end memcheck knows."""
    from fla.ops.kda import launches, triton

    def new_parts(like, *wanted):
        return [like.new_empty(shape, dtype=dtype) for dtype, *shape in wanted]

    with (
        mock.patch.object(launches, "new_parts", new_parts),
        mock.patch.object(triton, "FEW_CHUNKS", 0),
    ):
        yield

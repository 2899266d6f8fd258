"""``python -m benchmarks gpu --only attn|kda [options]``: one engine beside its peers."""

from __future__ import annotations

import argparse
import importlib

MODULES = {"attn": "benchmarks.softmax_gpu", "kda": "benchmarks.kda_gpu"}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--only", choices=MODULES, help="all engines by default")
    chosen, rest = parser.parse_known_args(argv)
    names = [chosen.only] if chosen.only else list(MODULES)
    return max(importlib.import_module(MODULES[name]).main(rest) for name in names)

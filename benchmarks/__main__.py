"""``python -m benchmarks [cpu|gpu|counters] [options]``: cpu or gpu by what there is."""

import importlib
import sys

import torch


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("cpu", "gpu", "counters"):
        where, *argv = argv
    else:
        where = "gpu" if torch.cuda.is_available() else "cpu"
    return importlib.import_module(f"benchmarks.{where}").main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

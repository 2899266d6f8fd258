"""The command ``fla``: what would run on this machine, and whether it runs right."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

import fla.modules  # whose engines are listed too
import fla.ops
from fla.ops.common.device import triton_version
from fla.ops.common.dispatch import Engine, Problem
from fla.testing.check import DTYPES, check
from fla.testing.report import aligned

DISTRIBUTION = "fla-ops"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fla", description=fla.__doc__)
    parser.add_argument("--version", action="version", version=f"fla {fla.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    runs = {"info": info, "check": check}
    for name, run in runs.items():
        commands.add_parser(name, help=run.__doc__, description=run.__doc__)
    return runs[parser.parse_args(argv).command]()


def info() -> int:
    """Print versions, devices, and which implementation of each engine would run on them."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows = [
        ["fla", f"{fla.__version__} in {Path(__file__).parent}"],
        ["python", platform.python_version()],
        ["torch", torch.__version__],
        ["triton", triton_version() or "not installed"],
        *([str(device), _describe(device)] for device in devices),
    ]
    print(*aligned(rows), sep="\n")
    for engine in Engine.registry.values():
        print(f"\n{engine.name} engine")
        print(*aligned([row for device in devices for row in _fates(engine, device)]), sep="\n")
    for other in _intruders():
        print(f"\nwarning: {other} has laid files into fla/: uninstall both and install one again")
    return 0


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"


def _fates(engine: Engine, device: torch.device) -> list[list[str]]:
    """Device, dtypes, implementation and what becomes of it; dtypes that fare alike share rows."""
    fates: dict[tuple[tuple[str, str | None], ...], list[str]] = {}
    for name, dtype in DTYPES.items():
        fate = tuple(engine.explain(Problem(device, dtype, K=128, V=128)))
        fates.setdefault(fate, []).append(name)
    rows = []
    for fate, dtypes in fates.items():
        chosen = next(name for name, objection in fate if objection is None)
        for name, objection in fate:
            verdict = "runs" if name == chosen else objection or f"could run, {chosen} is preferred"
            rows.append([str(device), " ".join(dtypes), name, verdict])
    return rows


def _intruders() -> list[str]:
    """Other distributions with files in a folder ``fla``."""
    return sorted(
        f"{each.metadata['Name']} {each.version}"
        for each in metadata.distributions()
        if each.metadata["Name"] != DISTRIBUTION
        and any(file.parts[:1] == ("fla",) for file in each.files or ())
    )


if __name__ == "__main__":
    raise SystemExit(main())

"""What each kernel of a row keeps busy: ``python -m benchmarks counters [--only ENGINE]``.

Runs the rows of ``python -m benchmarks gpu`` under Nsight Compute, whose ``ncu`` is to be on the
path.  Prints of each kernel, forward and backward, how long it took with nothing in the caches, how
much of that time the parts of the chip were busy, and what most warps waited for meanwhile.  The
findings stand in ``measured``, or in the directory ``--out``.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu, suite
from benchmarks.suite import Found

_TIME = "gpu__time_duration.sum"
# Per cent of what a part can do, over the whole kernel
_BUSY = {
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "exp": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_elapsed",
    "shared": "l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
# How many warps wait for something while one issues; all reasons are of one section
_SECTION = "WarpStateStats"
_WAITING = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
_WORKING = "selected"


def main(argv: list[str]) -> int:
    parser = gpu.parser_for("counters", __doc__)
    parser.add_argument("--run", action="store_true", help="run the rows, which ncu looks at")
    options = parser.parse_args(argv)
    modules = gpu.meant(parser, options)
    if not options.run and shutil.which("ncu") is None:
        parser.error("ncu, of Nsight Compute, is not on the path")
    for engine, module in modules.items():
        if options.run:
            run(module, options.rows)
            continue
        found = _counted(engine, options.rows)
        gpu.write(options, f"{module.SUITE.name}_counters", {"kernels": found})
        print(*_table(found), sep="\n", flush=True)
    return 0


def run(module: Any, rows: str) -> None:
    """Run each pass of each row, and say, as JSON, which kernels it launched.

    What is compiled, is before anybody looks.
    """
    from triton import knobs

    launched: list[str] = []
    knobs.runtime.launch_enter_hook.add(lambda what: launched.append(what.get()["name"]))
    for row in module.SUITE.rows:
        if rows not in row.name:
            continue
        with module.SUITE.around(row):
            for name, each in _passes(module.fla(row), row):
                each()
                launched.clear()
                torch.cuda.profiler.start()
                each()
                torch.cuda.profiler.stop()
                print(json.dumps([row.name, name, launched]), flush=True)


def _passes(call: suite.Call, row: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    inputs = row.inputs()
    do = inputs.pop("do")
    inputs, leaves = suite.differentiable(inputs)
    yield "forward", lambda: call(**inputs)
    if row.differentiable:
        o, x = call(**inputs), list(leaves.values())
        yield "backward", lambda: torch.autograd.grad(o, x, do, retain_graph=True)


def _counted(engine: str, rows: str) -> list[Found]:
    """What ncu says of each kernel that ``run`` launches, in their order."""
    with tempfile.TemporaryDirectory() as place:
        log = Path(place, "log")
        command = ["ncu", "--csv", "--page=raw", "--print-units=base", f"--log-file={log}"]
        command += ["--clock-control=none", "--profile-from-start=off"]
        command += [f"--section={_SECTION}", f"--metrics={','.join([_TIME, *_BUSY.values()])}"]
        command += [sys.executable, "-m", "benchmarks", "counters", "--run"]
        command += ["--only", engine, "--rows", rows]
        done = subprocess.run(command, cwd=gpu.ROOT, stdout=subprocess.PIPE, text=True)
        said = log.read_text() if log.exists() else ""
    if done.returncode:
        raise RuntimeError(f"ncu failed: {said[-1000:]}")
    table = csv.DictReader(line for line in said.splitlines() if line.startswith('"'))
    next(table, None)  # units
    counted = iter(table)
    found: list[Found] = []
    for line in done.stdout.splitlines():
        if line.startswith("["):
            row, name, launched = json.loads(line)
            for kernel in launched:
                counts = next((each for each in counted if each["Kernel Name"] == kernel), None)
                if counts is None:
                    raise RuntimeError(f"ncu has not counted {kernel}: {said[-1000:]}")
                found.append({"row": row, "pass": name, "kernel": kernel, **_read(counts)})
    ours = {each["kernel"] for each in found}
    if more := [each["Kernel Name"] for each in counted if each["Kernel Name"] in ours]:
        raise RuntimeError(f"ncu has counted more than was launched: {', '.join(more)}")
    return found


def _read(counts: dict[str, str]) -> Found:
    """µs, per cent, and warps that wait for the three reasons that most do."""
    read = {name: _number(text) for name, text in counts.items()}
    numbers = {name: x for name, x in read.items() if x is not None}
    if missing := {_TIME, *_BUSY.values()} - numbers.keys():
        raise RuntimeError(f"ncu has no number for {', '.join(sorted(missing))}")
    head, tail = _WAITING
    waiting = {
        name.removeprefix(head).removesuffix(tail): x
        for name, x in numbers.items()
        if name.startswith(head) and name.endswith(tail)
    }
    waiting.pop(_WORKING, None)
    most = sorted(waiting, key=lambda reason: -waiting[reason])[:3]
    return {
        "µs": numbers[_TIME] / 1e3,
        "busy, %": {part: numbers[name] for part, name in _BUSY.items()},
        "waiting": {reason: waiting[reason] for reason in most},
    }


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def _table(found: list[Found]) -> Iterator[str]:
    from fla.testing.report import aligned

    lines = [["kernel", "µs", *(f"{part} %" for part in _BUSY), "warps that wait for"]]
    of = None
    for each in found:
        if of != (of := f"{each['row']}, {each['pass']}"):
            lines.append([of, *[""] * (len(_BUSY) + 2)])
        busy = (f"{x:.0f}" for x in each["busy, %"].values())
        waiting = ", ".join(f"{reason} {x:.1f}" for reason, x in each["waiting"].items())
        lines.append([f"  {each['kernel']}", f"{each['µs']:.0f}", *busy, waiting])
    return aligned(lines)

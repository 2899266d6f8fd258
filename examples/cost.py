"""Time and memory against length: each operator, and PyTorch's softmax attention beside them.

    python -m examples.cost

One layer's mixing, forward and backward, 8 heads of 64 in fp32.  On a CPU each measurement runs in
a process of its own, on a GPU all run in this one.  ``python -m benchmarks`` measures thoroughly.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from benchmarks.cpu import Case, measure, prepare
from examples import command
from examples.progress import Progress
from fla.testing.report import aligned

SOFTMAX = "scaled_dot_product_attention"
OPERATORS = {
    "kda": "chunk_kda",
    "lightning": "chunk_lightning_attn",
    "simple_gla": "chunk_simple_gla",
    "linear": "chunk_linear_attn",
    "fox": "parallel_forgetting_attn",
    "softmax": SOFTMAX,
}
LENGTHS = {"cpu": [512, 1024, 2048, 4096, 8192], "cuda": [2048, 4096, 8192, 16384, 32768]}

Measured = dict[str, float]  # seconds and bytes


def costs(device: str, lengths: Sequence[int]) -> Iterator[tuple[str, Measured]]:
    """Of each operator, at each length."""
    cases = [(label, T) for T in lengths for label in OPERATORS]
    with Progress("cost", len(cases)) as bar:
        for done, (label, T) in enumerate(cases):
            bar.update(done, f"{label}, {T} tokens")
            case = Case(OPERATORS[label], T, backward=True)
            on = measure_on_gpu if torch.device(device).type == "cuda" else measure_apart
            yield label, on(case, device)


def measure_apart(case: Case, _: str) -> Measured:
    """In a fresh process: a server that has done nothing but imports forks it.

    NaN where the system kills it, as it does with one that wants more memory than there is.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.cpu"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(measure, case, 0.0).result()
        except BrokenProcessPool:
            print(f"\n{case}: its process was killed", file=sys.stderr)
            return {"seconds": math.nan, "bytes": math.nan}


def measure_on_gpu(case: Case, device: str) -> Measured:
    """Peak memory of a call and the least time of three."""
    with torch.device(device):
        call = prepare(case)
    call()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": min(seconds),
        "bytes": torch.cuda.max_memory_allocated(device) - before,
    }


def cell(measured: Measured) -> str:
    if math.isnan(measured["seconds"]):
        return "killed"
    ms = measured["seconds"] * 1e3
    return f"{ms:,.{0 if ms >= 10 else 2}f} ms, {measured['bytes'] / 1e6:,.0f} MB"


@command.entry
def main(argv: Sequence[str] | None = None) -> int:
    parser = command.parser("cost", __doc__)
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="default 512 to 8192, 32768 on a GPU"
    )
    options = parser.parse_args(argv)
    lengths = options.lengths or LENGTHS[torch.device(options.device).type]
    if min(lengths) < 1:
        parser.error(f"--lengths: expected at least 1, got {min(lengths)}")
    rows: dict[str, list[str]] = {}
    try:
        for label, measured in costs(options.device, lengths):
            rows.setdefault(label, [label]).append(cell(measured))
    finally:
        head = ["time, memory", *(f"{T} tokens" for T in lengths)]
        whole = (row + [""] * (len(head) - len(row)) for row in rows.values())
        print(*aligned([head, *whole]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

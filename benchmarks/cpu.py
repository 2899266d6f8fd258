"""Time and memory on the CPU, each row beside the target that it is held to.

Every measurement runs in a process of its own, so that none inherits another's memory.  Memory is
the peak above what inputs and libraries take; time is the median of repeated calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fla
from fla.testing import Shape, all_specs, linear
from fla.testing.report import aligned, track
from fla.testing.spec import Arguments, Draw

Function = Callable[..., Any]
RESULTS = Path(__file__).parent / "results" / "cpu.json"
IMPORT = "import fla.ops"

# How the benchmark calls each operator: the variant of its spec.
VARIANTS = {
    "chunk_simple_gla": "gate",
    "fused_chunk_simple_gla": "gate",
    "chunk_linear_attn": "normalised",
    "fused_chunk_linear_attn": "normalised",
    "chunk_lightning_attn": "plain",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: B1 H8 D64, fp32 unless said otherwise."""

    operator: str
    T: int = 0
    backward: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        passes = "forward and backward" if self.backward else "forward"
        return f"{self.operator} {passes} T{self.T} {self.dtype}" if self.T else self.operator


@dataclasses.dataclass(frozen=True)
class Row:
    """A quantity of a case, or its ratio to that of another, and the target it must reach."""

    name: str
    quantity: str  # seconds or bytes
    of: Case
    over: Case | None = None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def cases(self) -> list[Case]:
        return [self.of] if self.over is None else [self.of, self.over]

    def value(self, measured: dict[Case, dict[str, float]]) -> float:
        value = measured[self.of][self.quantity]
        return value if self.over is None else value / measured[self.over][self.quantity]

    def reached(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (
            self.at_least is None or value >= self.at_least
        )


def rows() -> Iterator[Row]:
    for operator in VARIANTS:
        for backward, passes in ((False, "forward"), (True, "forward and backward")):
            short, long = (Case(operator, T, backward) for T in (4096, 8192))
            name = f"{operator} {passes}"
            yield Row(f"{name}: time, T 8192 / 4096", "seconds", long, short, at_most=2.2)
            yield Row(f"{name}: memory, T 8192 / 4096", "bytes", long, short, at_most=2.1)
            half = dataclasses.replace(short, dtype="bfloat16")
            yield Row(f"{name}: time, bf16 / fp32, T 4096", "seconds", half, short, at_most=1.3)
        whole = Case(operator, 16384, backward=True)
        yield Row(
            f"{operator} forward and backward: memory, T 16384", "bytes", whole, at_most=1.5e9
        )
    ours, naive = (Case(name, 4096) for name in ("chunk_simple_gla", "naive_recurrent_simple_gla"))
    yield Row(f"{naive.operator} / {ours.operator}, T 4096", "seconds", naive, ours, at_least=15)
    for T in (2048, 4096):
        ours, sdpa = (
            Case(name, T) for name in ("chunk_simple_gla", "scaled_dot_product_attention")
        )
        yield Row(f"{sdpa.operator} / {ours.operator}, T {T}", "seconds", sdpa, ours, at_least=1)
    yield Row(f"{IMPORT} beyond import torch", "seconds", Case(IMPORT), at_most=0.3)


def prepare(case: Case) -> Function:
    """Make the inputs of a case; the result runs it once."""
    dtype = getattr(torch, case.dtype)
    shape = Shape(T=case.T, B=1, H=8, K=64, V=64)
    if case.operator in PEERS:
        generator = torch.Generator().manual_seed(0)
        draw = functools.partial(_normal, generator=generator, dtype=dtype)
        function, arguments = PEERS[case.operator](shape, draw)
    else:
        spec = next(spec for spec in all_specs() if spec.name == case.operator)
        function, arguments = spec.run, spec.arguments(shape, VARIANTS[spec.name], dtype)
    if not case.backward:
        return torch.no_grad()(lambda: function(**arguments))
    cotangent = torch.randn_like(arguments["v"])  # every output has the shape of v
    leaves = [x.requires_grad_() for x in arguments.values() if isinstance(x, torch.Tensor)]

    def forward_and_backward() -> Any:
        result = function(**arguments)
        o = result if isinstance(result, torch.Tensor) else result[0]
        return torch.autograd.grad(o, leaves, cotangent)

    return forward_and_backward


def _normal(*size: int, **more: Any) -> Tensor:
    return torch.randn(size, **more)


def _naive_recurrent_simple_gla(shape: Shape, draw: Draw) -> tuple[Function, Arguments]:
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    return naive_recurrent_simple_gla, {**linear.qkv(shape, draw), **linear.gate(shape, draw)}


def _sdpa(shape: Shape, draw: Draw) -> tuple[Function, Arguments]:
    """Causal, heads first and contiguous, as it likes its inputs best."""

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    heads_first = dataclasses.replace(shape, T=shape.H, H=shape.T)
    return causal, linear.qkv(heads_first, draw)


PEERS = {
    "naive_recurrent_simple_gla": _naive_recurrent_simple_gla,
    "scaled_dot_product_attention": _sdpa,
}


def measure(case: Case, repeat_for: float) -> dict[str, float]:
    """Peak memory of a first call and the median time of the following ones, at least three."""
    prepare(dataclasses.replace(case, T=64))()  # what only the first call of all has to do
    call = prepare(case)
    _forget_peak()
    before = _peak()
    call()
    memory = _peak() - before
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < repeat_for:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "bytes": memory, "calls": len(seconds)}


def _forget_peak() -> None:
    """On Linux the peak starts anew; elsewhere it includes that of the imports."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_apart(case: Case, repeat_for: float = 2.0) -> dict[str, float]:
    """``measure`` in a process of its own."""
    if case.operator == IMPORT:
        code = (
            f"import time, torch; t = time.perf_counter(); {IMPORT}; print(time.perf_counter() - t)"
        )
        runs = [float(_python("-c", code)) for _ in range(5)]
        return {"seconds": statistics.median(runs), "calls": len(runs)}
    arguments = json.dumps([dataclasses.asdict(case), repeat_for])
    return json.loads(_python("-m", "benchmarks.cpu", arguments))


def _python(*arguments: str) -> str:
    run = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return run.stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu", description=__doc__)
    parser.add_argument("--only", default="", metavar="NAME", help="only rows that contain NAME")
    only = parser.parse_args(argv).only
    machine = _machine()
    chosen = [row for row in rows() if only in row.name]
    cases = list(dict.fromkeys(case for row in chosen for case in row.cases))
    measured = {case: measure_apart(case) for case in track(cases, str)}
    results = [_result(row, measured) for row in chosen]
    if not only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": machine, "rows": results}, indent=1) + "\n")
    print(*aligned(_table(results)), sep="\n")
    return 0 if all(result["reached"] for result in results) else 1


def _result(row: Row, measured: dict[Case, dict[str, float]]) -> dict[str, object]:
    value = row.value(measured)
    return {
        "name": row.name,
        "quantity": row.quantity,
        "value": value,
        "at_most": row.at_most,
        "at_least": row.at_least,
        "reached": row.reached(value),
        "measured": [{"case": str(case), **measured[case]} for case in row.cases],
    }


def _table(results: list[dict[str, Any]]) -> Iterator[list[str]]:
    yield ["", "measured", "", "target", ""]
    for result in results:
        quantity = result["quantity"]
        parts = [_human(each[quantity], quantity) for each in result["measured"]]
        one = len(parts) == 1
        value = parts[0] if one else f"{result['value']:.2f}"
        sign, bound = "≤", result["at_most"]
        if bound is None:
            sign, bound = "≥", result["at_least"]
        target = f"{sign} {_human(bound, quantity) if one else bound}"
        verdict = "reached" if result["reached"] else "MISSED"
        yield [result["name"], value, "" if one else " / ".join(parts), target, verdict]


def _human(value: float, quantity: str) -> str:
    if quantity == "bytes":
        return f"{value / 1e6:.0f} MB"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def _machine() -> dict[str, object]:
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "fla": fla.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # what else ran in the minute before; more than 0.3 disturbs
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    fields, seconds = json.loads(sys.argv[1])
    print(json.dumps(measure(Case(**fields), seconds)))

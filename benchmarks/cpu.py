"""Time and memory on the CPU, each row beside the target that it is held to.

Every measurement runs in a process of its own, so that none inherits another's memory.  Memory is
the peak above what inputs and libraries take; time is the median of repeated calls, the least of
several rounds: a machine that others share is slower for minutes.  What other processes take
meanwhile stands beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import inspect
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
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

import fla
from benchmarks import OUT
from fla import ops
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from fla.testing.report import aligned, track

IMPORT = "import fla.ops"
# A measurement is repeated while other processes take more than this share of a core.
DISTURBING, TRIES = 0.1, 3
ROUNDS = 3
H, D = 8, 64

Arguments = dict[str, Any]


def qkv(T: int, dtype: torch.dtype) -> Arguments:
    return {name: torch.randn(1, T, H, D, dtype=dtype) for name in ("q", "k", "v")}


def positive(T: int, dtype: torch.dtype) -> Arguments:
    """Queries and keys as a normaliser wants them."""
    made = qkv(T, dtype)
    return {**made, "q": made["q"].exp(), "k": made["k"].exp()}


def gated(T: int, dtype: torch.dtype) -> Arguments:
    return {**qkv(T, dtype), "g": logsigmoid(torch.randn(1, T, H) + 4)}


def layer(T: int, dtype: torch.dtype) -> Arguments:
    return {**qkv(T, dtype), "layer_idx": 1, "num_layers": 4}


def delta(T: int, dtype: torch.dtype) -> Arguments:
    """As a Kimi-Linear model calls it, its gate computed before."""
    return {
        **qkv(T, dtype),
        "g": logsigmoid(torch.randn(1, T, H, D) + 4),
        "beta": torch.rand(1, T, H),
        "use_qk_l2norm_in_kernel": True,
    }


def heads_first(T: int, dtype: torch.dtype) -> Arguments:
    """Contiguous as scaled_dot_product_attention likes it best."""
    return {name: torch.randn(1, H, T, D, dtype=dtype) for name in ("q", "k", "v")}


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def transformers_chunk_kda(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
    return _transformers("chunk_kimi_delta_attention")(q, k, v, **more)


def transformers_recurrent_kda(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
    function = _transformers("recurrent_kimi_delta_attention")
    return function(q, k, v, **more, initial_state=None, output_final_state=False)


@functools.cache
def _transformers(name: str) -> Callable[..., Any]:
    """Its own function: as it stands in the module, it hands over to this package."""
    module = importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
    return inspect.unwrap(getattr(module, name))


# What is measured, and on what: ours, whose time and memory are to be linear in T, …
LINEAR: dict[str, tuple[Callable[..., Any], Callable[..., Arguments]]] = {
    "chunk_simple_gla": (ops.chunk_simple_gla, gated),
    "fused_chunk_simple_gla": (ops.fused_chunk_simple_gla, gated),
    "chunk_linear_attn": (ops.chunk_linear_attn, positive),
    "fused_chunk_linear_attn": (ops.fused_chunk_linear_attn, positive),
    "chunk_lightning_attn": (ops.chunk_lightning_attn, layer),
    "chunk_kda": (ops.chunk_kda, delta),
}
# … the others, and what they are compared with.
OPERATORS = LINEAR | {
    "fused_recurrent_kda": (ops.fused_recurrent_kda, delta),
    "parallel_forgetting_attn": (ops.parallel_forgetting_attn, gated),
    "naive_recurrent_simple_gla": (naive_recurrent_simple_gla, gated),
    "scaled_dot_product_attention": (softmax_attention, heads_first),
    "transformers chunk": (transformers_chunk_kda, delta),
    "transformers recurrent": (transformers_recurrent_kda, delta),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: B1 H8 D64, fp32 unless said otherwise."""

    operator: str
    T: int = 0
    backward: bool = False
    dtype: str = "float32"

    @property
    def call(self) -> str:
        return f"{self.operator} {'forward and backward' if self.backward else 'forward'}"

    def __str__(self) -> str:
        return f"{self.call}, T {self.T}, {self.dtype}" if self.T else self.operator


@dataclasses.dataclass(frozen=True)
class Row:
    """A quantity of a case, or its ratio to that of another, and how large it may be."""

    name: str
    quantity: str  # "seconds" or "bytes"
    at_most: float
    of: Case
    over: Case | None = None

    @property
    def cases(self) -> list[Case]:
        return [self.of] if self.over is None else [self.of, self.over]

    def value(self, measured: dict[Case, dict[str, float]]) -> float:
        value = measured[self.of][self.quantity]
        return value if self.over is None else value / measured[self.over][self.quantity]


def rows() -> Iterator[Row]:
    for operator in LINEAR:
        yield from linear_in_length(operator)
    yield against("naive_recurrent_simple_gla", 1 / 15, Case("chunk_simple_gla", 4096))
    for T in (2048, 4096):
        yield against("scaled_dot_product_attention", 1, Case("chunk_simple_gla", T))
    for backward in (False, True):
        yield against("transformers chunk", 0.1, Case("chunk_kda", 2048, backward))
        yield against("transformers chunk", 0.25, Case("chunk_kda", 2048, backward), "bytes")
    yield against("transformers recurrent", 1, Case("fused_recurrent_kda", 1))
    for backward, most in ((False, 1.5), (True, 2)):
        forgetting = Case("parallel_forgetting_attn", 4096, backward)
        yield against("scaled_dot_product_attention", most, forgetting)
    yield Row(f"{IMPORT} beyond import torch", "seconds", 0.3, Case(IMPORT))


def linear_in_length(operator: str) -> Iterator[Row]:
    for backward in (False, True):
        short, long = Case(operator, 4096, backward), Case(operator, 8192, backward)
        half = dataclasses.replace(short, dtype="bfloat16")
        yield Row(f"{short.call}: time, T 8192 / 4096", "seconds", 2.2, long, short)
        yield Row(f"{short.call}: memory, T 8192 / 4096", "bytes", 2.1, long, short)
        yield Row(f"{short.call}: time, bf16 / fp32, T 4096", "seconds", 1.3, half, short)
    whole = Case(operator, 16384, backward=True)
    yield Row(f"{whole.call}: memory, T 16384", "bytes", 1.5e9, whole)


def against(peer: str, at_most: float, ours: Case, quantity: str = "seconds") -> Row:
    what = {"seconds": "time", "bytes": "memory"}[quantity]
    theirs = dataclasses.replace(ours, operator=peer)
    return Row(f"{ours.call}: {what} / {peer}, T {ours.T}", quantity, at_most, ours, theirs)


def prepare(case: Case) -> Callable[[], Any]:
    """Make the inputs of a case; the result runs it once."""
    torch.manual_seed(0)
    function, inputs = OPERATORS[case.operator]
    arguments = inputs(case.T, getattr(torch, case.dtype))
    if not case.backward:
        return torch.no_grad()(lambda: function(**arguments))
    cotangent = torch.randn_like(arguments["v"])  # every output has the shape of v
    leaves = [x.requires_grad_() for x in arguments.values() if isinstance(x, Tensor)]

    def forward_and_backward() -> Any:
        result = function(**arguments)
        o = result if isinstance(result, Tensor) else result[0]
        return torch.autograd.grad(o, leaves, cotangent)

    return forward_and_backward


def measure(case: Case, repeat_for: float) -> dict[str, float]:
    """Peak memory of a first call and the median time of the following ones, at least three."""
    prepare(dataclasses.replace(case, T=64))()  # what only the first call of all has to do
    call = prepare(case)
    _forget_peak()
    before = _peak()
    call()
    memory = _peak() - before
    seconds: list[float] = []
    others = _others_seconds()
    while len(seconds) < 3 or sum(seconds) < repeat_for:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "bytes": memory,
        "calls": len(seconds),
        "others": (_others_seconds() - others) / sum(seconds),
    }


_PROC = Path("/proc/self")


def _forget_peak() -> None:
    """On Linux the peak starts anew; elsewhere it includes that of the imports."""
    if _PROC.exists():
        (_PROC / "clear_refs").write_text("5")


def _peak() -> int:
    if _PROC.exists():  # getrusage's includes that of the process that started this one
        status = (_PROC / "status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _others_seconds() -> float:
    """Processor time that other processes have had so far, where it can be known."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split()[1:11])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def measure_apart(case: Case, repeat_for: float = 0.7) -> dict[str, float]:
    """``measure`` in a process of its own; again, if others disturb it, and the least disturbed."""
    tries: list[dict[str, float]] = []
    while len(tries) < TRIES and not (tries and tries[-1]["others"] < DISTURBING):
        tries.append(_measure_apart(case, repeat_for))
    return min(tries, key=lambda found: found["others"])


def _measure_apart(case: Case, repeat_for: float) -> dict[str, float]:
    if case.operator == IMPORT:
        code = (
            f"import time, torch; t = time.perf_counter(); {IMPORT}; print(time.perf_counter() - t)"
        )
        runs = [float(_python("-c", code)) for _ in range(5)]
        return {"seconds": statistics.median(runs), "calls": len(runs), "others": 0.0}
    arguments = json.dumps([dataclasses.asdict(case), repeat_for])
    return json.loads(_python("-m", "benchmarks.cpu", arguments))


def _python(*arguments: str) -> str:
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if run.returncode:
        raise ChildProcessError(f"python {' '.join(arguments)}: {run.stderr}")
    return run.stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu", description=__doc__)
    parser.add_argument("--rows", default="", metavar="NAME", help="only rows that contain NAME")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIRECTORY", help="of the JSON")
    options = parser.parse_args(argv)
    chosen = [row for row in rows() if options.rows in row.name]
    if not chosen:
        parser.error(f"--rows: no row contains {options.rows!r}")
    if importlib.util.find_spec("transformers") is None:  # said now, not after minutes
        peers = [row for row in chosen if any("transformers" in str(case) for case in row.cases)]
        if peers:
            parser.error(f"{peers[0].name}: expected transformers, which is not installed")
    cases = list(dict.fromkeys(case for row in chosen for case in row.cases))
    rounds: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for case in track(cases * ROUNDS, str):
        rounds[case].append(measure_apart(case))
    measured = {case: _least(found) for case, found in rounds.items()}
    results = [_result(row, measured) for row in chosen]
    print(*aligned(_table(results)), sep="\n")
    if not options.rows:
        options.out.mkdir(parents=True, exist_ok=True)
        record = json.dumps({"machine": _machine(), "rows": results}, indent=1)
        (options.out / "cpu.json").write_text(record + "\n")
    for case, found in measured.items():
        if found["others"] > DISTURBING:
            print(f"disturbed: {case}: other processes had {found['others']:.1f} cores")
    return 0 if all(result["reached"] for result in results) else 1


def _least(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The fastest round, and the most memory: what the system takes away meanwhile counts too."""
    most = {name: max(found[name] for found in rounds) for name in rounds[0] if name == "bytes"}
    return min(rounds, key=lambda found: found["seconds"]) | most


def _result(row: Row, measured: dict[Case, dict[str, float]]) -> dict[str, Any]:
    value = row.value(measured)
    return {
        "name": row.name,
        "quantity": row.quantity,
        "value": value,
        "at_most": row.at_most,
        "reached": value <= row.at_most,
        "measured": [{"case": str(case), **measured[case]} for case in row.cases],
    }


def _table(results: list[dict[str, Any]]) -> Iterator[list[str]]:
    yield ["", "measured", "target", "", ""]
    for result in results:
        quantity = result["quantity"]
        parts = [_human(each[quantity], quantity) for each in result["measured"]]
        alone = len(parts) == 1
        value, target = (
            _human(number, quantity) if alone else _ratio(number)
            for number in (result["value"], result["at_most"])
        )
        verdict = "reached" if result["reached"] else "MISSED"
        yield [result["name"], value, f"<= {target}", verdict, "" if alone else " / ".join(parts)]


def _ratio(value: float) -> str:
    return f"{value:.3g}" if value >= 0.5 else f"1/{1 / value:.3g}"


def _human(value: float, quantity: str) -> str:
    if quantity == "bytes":
        return f"{value / 1e6:.0f} MB"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _machine() -> dict[str, object]:
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "fla": fla.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
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

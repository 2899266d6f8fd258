"""The softmax engine on a GPU beside other libraries, each in a process of its own.

``python -m benchmarks.softmax_gpu [--peer DIRECTORY] [--out FILE]`` prints one line a row, forward
and backward in ms, and the errors of bf16 against fp64.  DIRECTORY holds another package called
``fla`` with the same operators; as a script, this file times whichever one its process finds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

Function = Callable[..., Any]
RESULTS = Path(__file__).parent / "results" / "softmax_gpu.json"
PACKED = (1300, 547, 2048, 963, 271, 3063)


@dataclasses.dataclass(frozen=True)
class Row:
    """One call in bf16.  Its gate is logsigmoid(N(gate, 1)); ``first`` are the ms to be reached."""

    name: str
    first: tuple[float | None, float | None]
    B: int = 1
    T: int = 8192
    HQ: int = 32
    H: int = 8
    D: int = 128
    gate: float | None = None
    window: int | None = None
    lengths: tuple[int, ...] = ()
    decoding: bool = False
    everything: bool = False  # nothing is left out

    def bounds(self, device: str = "cuda") -> Tensor | None:
        """Where packed sequences begin and end."""
        if not self.lengths:
            return None
        return torch.tensor([0, *itertools.accumulate(self.lengths)], device=device).int()

    def inputs(self, heads: int | None = None) -> dict[str, Tensor | None]:
        """q, k, v, g and do; of the first ``heads`` key heads alone."""
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(size, generator=generator, device="cuda", dtype=dtype)

        B, T, N = self.B, self.T, len(self.lengths)
        rows = (1, N) if self.decoding else (B, T)
        made = {
            "q": draw(*rows, self.HQ, self.D),
            "k": draw(B, T, self.H, self.D),
            "v": draw(B, T, self.H, self.D),
            "do": draw(*rows, self.HQ, self.D),
        }
        some = heads or self.H
        few = {"q": some * (self.HQ // self.H), "do": some * (self.HQ // self.H)}
        made = {name: x[:, :, : few.get(name, some)].contiguous() for name, x in made.items()}
        g = None
        if self.gate is not None:
            g = draw(B, T, self.HQ, dtype=torch.float32)[:, :, : few["q"]].contiguous()
            g = logsigmoid(g + self.gate)
        return {**made, "g": g}


def _decoding(name: str, first: float, N: int, keys: int, gate: float | None = None) -> Row:
    return Row(name, (first, None), T=N * keys, lengths=(keys,) * N, gate=gate, decoding=True)


ROWS = (
    Row("parallel_attn B1 T8192 HQ32 H8 D128", (1.25, 4.0)),
    Row("parallel_attn B4 T4096 H16 D64", (0.40, 1.5), B=4, T=4096, HQ=16, H=16, D=64),
    Row("parallel_attn window 1024", (0.36, 1.2), window=1024),
    Row("parallel_forgetting_attn, nothing forgotten", (1.4, 4.6), gate=12.0),
    Row("parallel_forgetting_attn N(4, 1)", (0.80, 2.7), gate=4.0),
    Row("parallel_forgetting_attn N(4, 1), all met", (None, None), gate=4.0, everything=True),
    Row("parallel_forgetting_attn N(4, 1), packed", (0.40, 1.4), gate=4.0, lengths=PACKED),
    _decoding("attn_decoding N64 x 8192 keys", 0.60, 64, 8192),
    _decoding("attn_decoding N1 x 131072 keys", 0.18, 1, 131072),
    _decoding("attn_decoding N16 x 8192 keys, gate", 0.19, 16, 8192, 4.0),
    Row("parallel_forgetting_attn N(0, 1) T16384", (None, None), T=16384, gate=0.0),
    Row("parallel_forgetting_attn N(0, 1) T32768", (None, None), T=32768, gate=0.0),
    Row("parallel_forgetting_attn N(0, 1) T65536", (None, None), T=65536, gate=0.0),
)


def fla(row: Row) -> Function:
    """A function of q, k, v and g, from the ``fla`` that this process finds."""
    from fla.ops import attn, forgetting_attn

    bounds = row.bounds()
    if row.decoding:
        from fla.ops.attn.decoding import attn_decoding_one_step

        return lambda q, k, v, g: attn_decoding_one_step(q, k, v, g, cu_seqlens=bounds)
    if row.gate is not None:
        forget = forgetting_attn.parallel_forgetting_attn
        return lambda q, k, v, g: forget(q, k, v, g, cu_seqlens=bounds)
    return lambda q, k, v, g: attn.parallel_attn(q, k, v, window_size=row.window)


def torch_sdpa(row: Row, backend: str) -> Function | None:
    """PyTorch's attention on heads-first views, which cost it nothing."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if row.gate is not None or row.window or row.decoding:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            grouped = row.HQ != row.H
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=grouped
            ).transpose(1, 2)

    return run


def flex(row: Row) -> Function | None:
    """FlexAttention, compiled, with a mask of blocks; a gate as a score of its running sum."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if row.decoding or row.lengths or row.everything or row.T > 8192:
        return None
    window = row.window or row.T

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    torch._functorch.config.donated_buffer = False  # the backward pass runs more than once
    mask = create_block_mask(seen, None, None, row.T, row.T, device="cuda")
    attention = torch.compile(flex_attention)
    score, gate = None, row.inputs()["g"]
    if gate is not None:
        sums = gate.cumsum(1).transpose(1, 2).contiguous()  # the time of which does not count

        def score(s, b, h, i, j):
            return s + sums[b, h, i] - sums[b, h, j]

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = attention(q, k, v, score_mod=score, block_mask=mask, enable_gqa=row.HQ != row.H)
        return out.transpose(1, 2)

    return run


LIBRARIES: dict[str, Callable[[Row], Function | None]] = {
    "ours": fla,
    "fla-core": lambda row: None if row.everything else fla(row),
    "cudnn": functools.partial(torch_sdpa, backend="CUDNN_ATTENTION"),
    "flash": functools.partial(torch_sdpa, backend="FLASH_ATTENTION"),
    "flex": flex,
}


def measure(library: str, row: Row) -> dict[str, Any]:
    """Median ms of the forward pass and of the backward pass alone, and the errors."""
    from triton.testing import do_bench

    function = LIBRARIES[library](row)
    if function is None:
        return {}
    inputs = row.inputs()
    do = inputs.pop("do")
    time_of = functools.partial(do_bench, warmup=100, rep=200, return_mode="median")
    with torch.inference_mode(), _context(library, row):
        found: dict[str, Any] = {"forward": time_of(lambda: function(**inputs))}
    gradients = not row.decoding and not (library == "flex" and row.gate is not None)
    if gradients:
        leaves = [x.requires_grad_() for x in inputs.values() if x is not None]
        with _context(library, row):
            o = function(**inputs)
            found["backward"] = time_of(
                lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)
            )
        del o, leaves
    if library in ("ours", "flash", "cudnn") and (row.decoding or row.T <= 8192):
        found["errors"] = errors(library, row)
    return found


def _context(library: str, row: Row) -> contextlib.AbstractContextManager[None]:
    if library != "ours" or not row.everything:
        return contextlib.nullcontext()
    from fla.ops.attn.blocks import nothing_left_out

    return nothing_left_out()


def errors(library: str, row: Row) -> dict[str, float]:
    """RMS(found − exact) / RMS(exact) against fp64, on the query heads of one key head."""
    one = dataclasses.replace(row, HQ=row.HQ // row.H, H=1)
    inputs = {name: x for name, x in row.inputs(1).items() if x is not None}
    wide = {name: x.double() for name, x in inputs.items()}
    found = _results(LIBRARIES[library](one), inputs, row.decoding)
    exact = _results(_in_fp64(one), wide, row.decoding)
    return {
        name: ((found[name].double() - value).norm() / value.norm()).item()
        for name, value in exact.items()
    }


def _in_fp64(row: Row) -> Function:
    if not row.decoding:
        return fla(row)
    from fla.ops.attn.naive import naive_attn_decoding

    bounds = row.bounds("cpu")
    return lambda q, k, v, g: naive_attn_decoding(q, k, v, g, cu_seqlens=bounds)


def _results(function: Function | None, inputs: dict[str, Tensor], decoding: bool):
    assert function is not None
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if name != "do"}
    o = function(**{"g": None, **leaves})
    if decoding:
        return {"o": o.detach()}
    gradients = torch.autograd.grad(o, list(leaves.values()), inputs["do"].to(o.dtype))
    return {"o": o.detach()} | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))


def first_call() -> list[float]:
    """Seconds of the first gated call, forward and backward, where nothing is compiled yet."""
    row = Row("", (None, None), T=1024, gate=4.0)
    function, inputs = fla(row), row.inputs()
    do = inputs.pop("do")
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if x is not None}
    torch.cuda.synchronize()
    times = [time.perf_counter()]
    o = function(**leaves)
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    torch.autograd.grad(o, list(leaves.values()), do)
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def host_time() -> dict[str, float]:
    """Wall clock in ms of a small call among 200 back to back."""
    row = Row("", (None, None), T=128, HQ=4, H=2, D=64, gate=4.0)
    inputs = row.inputs()
    inputs.pop("do")
    found = {}
    for name, gate in (("parallel_attn", None), ("parallel_forgetting_attn", 4.0)):
        function = fla(dataclasses.replace(row, gate=gate))
        with torch.inference_mode():
            for _ in range(20):
                function(**inputs)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                function(**inputs)
            torch.cuda.synchronize()
        found[name] = (time.perf_counter() - start) * 5
    return found


def work(library: str) -> None:
    """Measure every row in this process; one line of JSON each."""
    for i, row in enumerate(ROWS):
        try:
            found = measure(library, row)
        except Exception as problem:  # the other rows are still to be measured
            found = {"problem": f"{type(problem).__name__}: {problem}"[:300]}
        torch.cuda.empty_cache()
        print(json.dumps([i, found]), flush=True)
    if library in ("ours", "fla-core"):
        print(json.dumps(["host", host_time()]), flush=True)


def start(library: str, directory: Path, seconds: float = 300) -> dict[Any, dict[str, Any]]:
    """Run ``work`` in a process that finds the package of ``directory``."""
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    command = [sys.executable, __file__, "--library", library]
    result = subprocess.run(
        ["timeout", str(seconds), *command], env=environment, stdout=subprocess.PIPE, text=True
    )
    return dict(json.loads(line) for line in result.stdout.splitlines())


def cell(found: dict[str, Any]) -> str:
    return " / ".join(f"{found[x]:.3f}" for x in ("forward", "backward") if x in found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu --only attn")
    parser.add_argument("--library")
    parser.add_argument("--first-call", action="store_true")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.library:
        work(arguments.library)
        return 0
    if arguments.first_call:
        print(json.dumps(first_call()))
        return 0
    from fla.ops.common.device import triton_version

    here = Path(__file__).parent.parent
    found = {
        library: start(library, (arguments.peer or here) if library == "fla-core" else here)
        for library in LIBRARIES
        if library != "fla-core" or arguments.peer
    }
    with tempfile.TemporaryDirectory() as cache:
        result = subprocess.run(
            [sys.executable, __file__, "--first-call"],
            env={**os.environ, "PYTHONPATH": str(here), "TRITON_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
        )
    record = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "first call": json.loads(result.stdout),
        "host": {library: each.get("host") for library, each in found.items()},
        "rows": [
            {**dataclasses.asdict(row), **{library: each.get(i) for library, each in found.items()}}
            for i, row in enumerate(ROWS)
        ],
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    show(found)
    print("first call, forward and backward, s:", record["first call"])
    print("host time a call, ms:", record["host"])
    return 0


def show(found: dict[str, dict[Any, dict[str, Any]]]) -> None:
    lines = [["forward / backward, ms", "first", *found, "errors"]]
    for i, row in enumerate(ROWS):
        each = [library.get(i, {}) for library in found.values()]
        first = " / ".join(f"{x:.2f}" for x in row.first if x is not None)
        named = (found["ours"].get(i, {}).get("errors") or {}).items()
        wrong = " ".join(f"{name} {error:.1e}" for name, error in named)
        problems = [x.get("problem", "")[:60] for x in each]
        lines.append(
            [row.name, first, *(cell(x) or p for x, p in zip(each, problems, strict=True)), wrong]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{x:<{width}}" for x, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()

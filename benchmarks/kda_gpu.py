"""The delta engine on a GPU: ``python -m benchmarks.kda_gpu [--out FILE]``.

One line a row: median ms of the forward pass and of the backward pass alone, then the errors of
bf16 against fp64, of two heads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKED = (0, 1300, 1847, 3895, 4858, 5129, 8192)


@dataclasses.dataclass(frozen=True)
class Row:
    """One call of chunk_kda in bf16, or of fused_recurrent_kda with a state in and out.

    ``first`` are the ms to be reached.  Gates as a model has them: fast ones over the whole range
    of ``lower_bound``, slow ones as it starts, mixed ones slow with −80 at every 16th token.
    """

    name: str
    first: tuple[float | None, float | None]
    B: int = 1
    T: int = 8192
    H: int = 64
    D: int = 128
    gate: str = "fast"
    lower_bound: float | None = -5.0
    packed: bool = False
    recurrent: bool = False

    def inputs(self, heads: int | None = None) -> dict[str, Any]:
        """Keyword arguments, and do; of the first ``heads`` heads alone."""
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(size, generator=generator, device="cuda", dtype=dtype)

        B, T, H, D = self.B, self.T, self.H, self.D
        made: dict[str, Any] = {name: draw(B, T, H, D) for name in ("q", "k", "v", "do", "g")}
        made["beta"] = draw(B, T, H)
        made["A_log"] = torch.rand(H, generator=generator, device="cuda").mul_(15).add_(1).log_()
        made["dt_bias"] = draw(H * D, dtype=torch.float32)
        if self.gate != "fast":
            spread = torch.rand(H * D, generator=generator, device="cuda")
            rate = torch.exp(spread * 4.6 - 6.9)  # e^U(−6.9, −2.3)
            made["dt_bias"] = torch.log(
                torch.expm1(rate / made["A_log"].exp().repeat_interleave(D))
            )
            made["g"] *= 0.1
        if self.gate == "mixed":
            made["g"][:, ::16] = 80.0
        few = slice(0, heads or H)
        made = {name: x[:, :, few].contiguous() if x.dim() > 2 else x for name, x in made.items()}
        made["A_log"] = made["A_log"][few].contiguous()
        made["dt_bias"] = made["dt_bias"].view(H, D)[few].flatten()
        made |= {
            "lower_bound": self.lower_bound,
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
        }
        if self.packed:
            made["cu_seqlens"] = torch.tensor(PACKED, device="cuda", dtype=torch.int32)
        if self.recurrent:
            made["initial_state"] = draw(B, heads or H, D, D, dtype=torch.float32)
            made["output_final_state"] = True
        return made

    def call(self, **arguments: Any) -> Tensor:
        from fla.ops import kda

        function: Any = kda.fused_recurrent_kda if self.recurrent else kda.chunk_kda
        return function(**arguments)[0]


ROWS = (
    Row("chunk_kda T8192 H64, lower bound", (0.95, 2.8)),
    Row("chunk_kda T8192 H96, lower bound", (1.4, 4.2), H=96),
    Row("chunk_kda T8192 H96, packed", (1.4, 4.2), H=96, packed=True),
    Row("chunk_kda T8192 H64, softplus fast", (1.05, 3.1), lower_bound=None),
    Row("chunk_kda T8192 H64, softplus slow", (1.05, 3.1), gate="slow", lower_bound=None),
    Row("chunk_kda T8192 H64, softplus mixed", (1.05, 3.1), gate="mixed", lower_bound=None),
    Row("chunk_kda T65536 H8", (1.2, 3.2), T=65536, H=8),
    Row("chunk_kda B2 T1024 H32", (0.14, 0.36), B=2, T=1024, H=32),
    Row("fused_recurrent_kda B256 T1 H32", (0.30, None), B=256, T=1, H=32, recurrent=True),
    Row("fused_recurrent_kda B8 T1 H32", (0.020, None), B=8, T=1, H=32, recurrent=True),
)


def measure(row: Row) -> dict[str, Any]:
    from triton.testing import do_bench

    inputs = row.inputs()
    do = inputs.pop("do")
    with torch.inference_mode():
        time = do_bench(lambda: row.call(**inputs), 50, 150, return_mode="median")
        found: dict[str, Any] = {"forward": time}
    if not row.recurrent:
        leaves = [x.requires_grad_() for x in inputs.values() if _differentiable(x)]
        o = row.call(**inputs)

        def backward():
            torch.autograd.grad(o, leaves, do, retain_graph=True)

        found["backward"] = do_bench(backward, 50, 150, return_mode="median")
    if row.T <= 8192:
        found["errors"] = errors(row)
    return found


def errors(row: Row) -> dict[str, float]:
    """Of o and of every gradient, for two heads, against fp64 in whole-chunk PyTorch."""
    inputs = row.inputs(heads=2)
    do = inputs.pop("do")
    results = []
    for wide in (False, True):
        given = {
            name: x.detach().double() if wide and _differentiable(x) else x
            for name, x in inputs.items()
        }
        leaves = {name: x.requires_grad_() for name, x in given.items() if _differentiable(x)}
        o = row.call(**given)
        gradients = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
        results.append({"o": o.detach(), **dict(zip(leaves, gradients, strict=True))})
    found, expected = results
    return {
        name: ((found[name] - x).norm() / x.norm()).item()
        for name, x in expected.items()
        if math.isfinite(x.norm().item()) and x.norm() > 0
    }


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    table = {}
    for row in ROWS:
        if options.only not in row.name:
            continue
        table[row.name] = found = measure(row)
        times = [f"{found[key]:.3f}" for key in ("forward", "backward") if key in found]
        worst = ", ".join(f"{name} {x:.0e}" for name, x in found.get("errors", {}).items())
        print(f"{row.name:38} {' / '.join(times):16} first {row.first}   {worst}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

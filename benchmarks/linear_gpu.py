"""The linear engine's suite: ``python -m benchmarks gpu --only linear``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from benchmarks import suite
from benchmarks.suite import Call, Found, Suite

# Heads that are compared with fp64, and tokens of a chunk there
_HEADS, _CHUNK = 2, 64
_LAYERS = {"layer_idx": 4, "num_layers": 8}


@dataclasses.dataclass(frozen=True)
class Row(suite.Row):
    """One call in bf16; a gate g is logsigmoid(N(3, 1)), one per token and head.

    With ``a_byte`` it is to take at most so many times as long for each byte as the first row.
    """

    operator: str = "chunk_simple_gla"
    B: int = 1
    T: int = 8192
    H: int = 64
    K: int = 128
    V: int = 128
    gate: bool = False
    state: bool = False
    normalize: bool = False
    lengths: tuple[int, ...] = ()
    peer: bool = True  # fla-core, which searches long for its launches, runs it too
    a_byte: float | None = None

    def inputs(self, device: str = "cuda") -> Found:
        """What a model puts in, and do."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        tokens = self.B, self.T, self.H
        made: Found = {name: draw(*tokens, self.K) for name in ("q", "k")}
        made |= {name: draw(*tokens, self.V) for name in ("v", "do")}
        if self.normalize:  # away from zero
            made |= {name: made[name].abs() for name in ("q", "k")}
        if self.gate:
            made["g"] = logsigmoid(draw(*tokens, dtype=torch.float32) + 3)
        if self.state:
            made["initial_state"] = draw(self.B, self.H, self.K, self.V, dtype=torch.float32)
        return made


_FIRST = (0.25, 0.80)
_NONE = (None, None)
_H64 = Row("chunk_simple_gla T8192 H64 D128, g", _FIRST, gate=True)


def _beside(name: str, a_byte: float, **more: Any) -> Row:
    return dataclasses.replace(_H64, name=name, first=_NONE, peer=False, a_byte=a_byte, **more)


ROWS = (
    _H64,
    _beside("… packed", 1.0, lengths=suite.PACKED),
    _beside("… state in and out", 1.15, state=True),
    _beside("… D64", 1.15, K=64, V=64),
    _beside("… K64 V128", 1.15, K=64),
    _beside("… K128 V64", 1.15, V=64),
    Row("chunk_lightning_attn T8192 H64 D128", (0.24, 0.75), "chunk_lightning_attn"),
    Row("fused_chunk_linear_attn T8192 H64 D128", (0.24, 0.75), "fused_chunk_linear_attn"),
    Row("… normalised", _NONE, "fused_chunk_linear_attn", normalize=True),
    Row("chunk_lightning_attn T65536 H8 D128", (0.32, 0.90), "chunk_lightning_attn", T=65536, H=8),
    Row(
        "chunk_simple_gla B4 T4096 H4 K256 V512, g",
        (0.16, None),
        B=4,
        T=4096,
        H=4,
        K=256,
        V=512,
        gate=True,
    ),
    Row(
        "fused_recurrent_simple_gla B8 T256 H32 D128, g",
        _FIRST,
        "fused_recurrent_simple_gla",
        B=8,
        T=256,
        H=32,
        gate=True,
    ),
    Row(
        "parallel_simple_gla B4 T2048 H16 D128, g",
        (0.15, 0.50),
        "parallel_simple_gla",
        B=4,
        T=2048,
        H=16,
        gate=True,
    ),
)


def fla(row: Row, device: str = "cuda") -> Call:
    """o of a call, from the package ``fla`` that this process finds."""
    from fla import ops

    more: Found = {}
    if row.lengths:
        bounds = [0, *itertools.accumulate(row.lengths)]
        more["cu_seqlens"] = torch.tensor(bounds, device=device, dtype=torch.int32)
    if row.operator == "chunk_lightning_attn":
        more |= _LAYERS
    if row.operator == "fused_chunk_linear_attn":
        more["normalize"] = row.normalize
    if row.state:
        more["output_final_state"] = True
    call = getattr(ops, row.operator)
    return lambda **inputs: call(**inputs, **more)[0]


def measure(row: Row, library: str) -> Found:
    """First right, then fast: errors, ms, and memory of forward and backward together."""
    if library == "fla-core" and not row.peer:
        return {}
    call, inputs = fla(row), row.inputs()
    cotangent: Tensor | None = inputs.pop("do")
    every = {**inputs, "do": cotangent}
    exact = in_fp64(row, {name: _few_heads(x) for name, x in every.items()})
    found: Found = {}
    try:
        results = suite.results(call, inputs, cotangent)
    except RuntimeError as problem:  # fla-core refuses some gradients on some GPUs
        cotangent, found = None, {"backward problem": f"{problem}"[:200]}
        results = suite.results(call, inputs)
    few = {name: _few_heads(x) for name, x in results.items()}
    del results
    found["errors"] = suite.errors(few, {name: exact[name] for name in few})
    del few, exact
    if cotangent is not None:
        found["memory"] = suite.extra_memory(lambda: suite.results(call, inputs, cotangent))
    if library == "ours" and row is _H64:
        found["compiled again"] = compiled_again(row)
    return found | suite.times(call, inputs, cotangent)


def sdpa(row: Row) -> Found:
    """The time that PyTorch's softmax attention takes for the same shapes."""
    if row.K != row.V or row.K > 128 or row.lengths or row.T > 8192 or row.state or row.normalize:
        return {}
    inputs = row.inputs()
    q, k, v, do = (inputs[name].transpose(1, 2) for name in ("q", "k", "v", "do"))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    return suite.times(call, {"q": q, "k": k, "v": v}, do)


def _few_heads(x: Tensor) -> Tensor:
    """The first heads of [B, T, H, ...] or of a state [B, H, ...], which alone is in fp32."""
    return x[:, :_HEADS] if x.dtype == torch.float32 and x.dim() == 4 else x[:, :, :_HEADS]


def in_fp64(row: Row, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """o and every gradient as the textbook has them, a chunk at a time."""
    return suite.in_fp64(functools.partial(_textbook, row), inputs)


def _textbook(row: Row, initial_state: Tensor | None = None, **tokens: Tensor) -> Tensor:
    stops = itertools.accumulate(row.lengths or (row.T,))
    parts = []
    for start, stop in itertools.pairwise((0, *stops)):
        sequence = {name: x[:, start:stop] for name, x in tokens.items()}
        parts.append(_one_sequence(row, S=initial_state, **sequence))
    return torch.cat(parts, 1)


def _one_sequence(row: Row, q, k, v, g=None, S=None) -> Tensor:
    if row.operator == "chunk_lightning_attn":
        share = 1 - _LAYERS["layer_idx"] / _LAYERS["num_layers"]
        g = -8 / row.H * share * torch.arange(q.shape[2], device=q.device, dtype=q.dtype)
        g = g.expand(q.shape[:3])
    if row.normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    g = torch.zeros_like(q[..., 0]) if g is None else g
    if S is None:
        S = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    o = []
    for chunks in zip(*(x.transpose(1, 2).split(_CHUNK, 2) for x in (q, k, v, g)), strict=True):
        b_q, b_k, b_v, b_g = chunks  # [B, H, C, ...]
        sums = b_g.cumsum(-1)[..., None]
        last = sums[..., -1:, :]
        between = (sums - sums.mT).tril().exp().tril()
        o.append((b_q * sums.exp()) @ S + (b_q @ b_k.mT * between) @ b_v)
        S = last.exp() * S + (b_k * (last - sums).exp()).mT @ b_v
    out = torch.cat(o, 2).transpose(1, 2) * row.K**-0.5
    return out[..., :-1] / (out[..., -1:] + 1e-10) if row.normalize else out


def compiled_again(row: Row) -> int:
    """Kernels that 100 other lengths and packings compile; a copy to the host is an error."""
    rows = [dataclasses.replace(row, T=3100 + 37 * i) for i in range(50)]  # long: for Hopper too
    rows += [dataclasses.replace(each, lengths=(37, each.T - 37)) for each in rows]
    return suite.compiled_again([(fla(each), each.inputs()) for each in rows], (0, 49, 50, 99))


def host() -> Found:
    """Of small calls, without gradients, and of one forward and backward."""
    small = Row("", _NONE, B=1, T=128, H=4, K=64, V=64)
    rows = (
        dataclasses.replace(small, gate=True),
        dataclasses.replace(small, operator="chunk_lightning_attn"),
        dataclasses.replace(small, operator="fused_chunk_linear_attn"),
    )
    found = {}
    for row in rows:
        call, inputs = fla(row), row.inputs()
        do = inputs.pop("do")
        with torch.inference_mode():
            found[row.operator] = suite.wall_clock(functools.partial(call, **inputs))
        both = functools.partial(suite.results, call, inputs, do)
        with contextlib.suppress(RuntimeError):  # gradients that fla-core refuses
            found[f"{row.operator}, backward too"] = suite.wall_clock(both)
    return found


def first_call() -> Found:
    return suite.first_call(fla(_H64), _H64.inputs())


def settle(rows: list[Row], found: dict[str, Found]) -> list[Row]:
    """The rows, those with ``a_byte`` with the times that the first row's allow them."""
    first = found.get(_H64.name, {})
    if "backward" not in first:
        return rows
    bytes_of_first = _H64.K + _H64.V
    return [
        row
        if row.a_byte is None
        else dataclasses.replace(
            row,
            first=tuple(
                first[way] * row.a_byte * (row.K + row.V) / bytes_of_first
                for way in ("forward", "backward")
            ),
        )
        for row in rows
    ]


def remarks(rows: list[Found]) -> Iterator[str]:
    for row in rows:
        ours, triton = row.get("ours", {}), row.get("triton", {})
        if "compiled again" in ours:
            yield f"compiled again over 100 lengths: {ours['compiled again']}  {row['name']}"
        shares = [triton[x] / ours[x] for x in ("forward", "backward") if x in ours and x in triton]
        if shares:
            each = " / ".join(f"{x:.2f}" for x in shares)
            yield f"time in Triton over ours: {each}  {row['name']}"


SUITE = Suite(
    "linear_gpu",
    ROWS,
    {
        "ours": functools.partial(measure, library="ours"),
        "triton": suite.in_triton(functools.partial(measure, library="triton")),
        "fla-core": functools.partial(measure, library="fla-core"),
        "sdpa": sdpa,
    },
    host,
    first_call,
    remarks,
    settle,
)

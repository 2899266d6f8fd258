"""The delta engine's suite: ``python -m benchmarks gpu --only kda``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks import suite
from benchmarks.suite import Call, Found, Suite

# Heads that are compared with fp64, and tokens of a chunk there
_HEADS, _CHUNK = 2, 32


@dataclasses.dataclass(frozen=True)
class Row(suite.Row):
    """One call of chunk_kda in bf16, or of fused_recurrent_kda with a state in and out.

    Norms, gates and sigmoids are the operator's.  Gates as a model has them: fast ones as it has
    learnt them, slow ones as it starts, mixed ones slow with −80 at every 16th token.
    """

    B: int = 1
    T: int = 8192
    H: int = 64
    D: int = 128
    gate: str = "fast"
    lower_bound: float | None = -5.0
    lengths: tuple[int, ...] = ()
    recurrent: bool = False
    peer: bool = False  # fla-core runs it too; minutes of search, and slow gates are as fast ones

    @property
    def differentiable(self) -> bool:
        return not self.recurrent

    @property
    def spans(self) -> list[slice]:
        """Where sequences lie."""
        stops = itertools.accumulate(self.lengths or (self.T,))
        return [slice(a, b) for a, b in itertools.pairwise((0, *stops))]

    def inputs(self, device: str = "cuda") -> Found:
        """What a model puts in, and do."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        def uniform(size: int, low: float, high: float) -> Tensor:
            return torch.rand(size, generator=generator, device=device) * (high - low) + low

        B, T, H, D = self.B, self.T, self.H, self.D
        made: Found = {name: draw(B, T, H, D) for name in ("q", "k", "v", "do", "g")}
        made["beta"] = draw(B, T, H)
        made["A_log"] = uniform(H, 1, 16).log()
        made["dt_bias"] = draw(H * D, dtype=torch.float32)
        if self.gate != "fast":
            made["dt_bias"] = uniform(H * D, -6.9, -2.3).exp().expm1().log()  # softplus⁻¹(e^U)
            made["g"] *= 0.1
        if self.gate == "mixed":
            made["g"][:, ::16] = 80 * (-made["A_log"]).exp()[:, None]
        if self.recurrent:
            made["initial_state"] = draw(B, H, D, D, dtype=torch.float32)
        return made


def _chunked(name: str, forward: float | None, backward: float | None, **more: Any) -> Row:
    return Row(f"chunk_kda {name}", (forward, backward), **more)


def _recurrent(B: int, first: float) -> Row:
    name = f"fused_recurrent_kda B{B} T1 H32"
    return Row(name, (first, None), B=B, T=1, H=32, recurrent=True, peer=True)


_SOFTPLUS = {"lower_bound": None}
_LONG = {"T": 65536, "H": 8}
_SMALL = {"B": 2, "T": 1024, "H": 32}
ROWS = (
    _recurrent(256, 0.30),
    _recurrent(8, 0.020),
    _chunked("B2 T1024 H32", 0.14, 0.36, peer=True, **_SMALL),
    _chunked("B2 T1024 H32, slow", None, None, gate="slow", **_SMALL, **_SOFTPLUS),
    _chunked("B2 T1024 H32, mixed", None, None, gate="mixed", **_SMALL, **_SOFTPLUS),
    _chunked("T8192 H64, lower bound", 0.95, 2.8, peer=True),
    _chunked("T8192 H96, lower bound", 1.4, 4.2, peer=True, H=96),
    _chunked("T8192 H96, packed", 1.4, 4.2, peer=True, H=96, lengths=suite.PACKED),
    _chunked("T8192 H64, fast", 1.05, 3.1, peer=True, **_SOFTPLUS),
    _chunked("T8192 H64, slow", 1.05, 3.1, gate="slow", **_SOFTPLUS),
    _chunked("T8192 H64, mixed", 1.05, 3.1, gate="mixed", **_SOFTPLUS),
    _chunked("T65536 H8", 1.2, 3.2, peer=True, **_LONG),
    _chunked("T65536 H8, slow", None, None, gate="slow", **_LONG, **_SOFTPLUS),
    _chunked("T65536 H8, mixed", None, None, gate="mixed", **_LONG, **_SOFTPLUS),
)
# Of this one's calls the costs of use are counted.
_COUNTED = "B2 T1024 H32"


def fla(row: Row, device: str = "cuda") -> Call:
    """o of a call, from the package ``fla`` that this process finds."""
    from fla.ops import kda

    more: Found = {
        "lower_bound": row.lower_bound,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
    }
    if row.lengths:
        bounds = [0, *itertools.accumulate(row.lengths)]
        more["cu_seqlens"] = torch.tensor(bounds, device=device, dtype=torch.int32)
    if row.recurrent:
        more["output_final_state"] = True
    elif row.lower_bound is not None:
        more["safe_gate"] = True  # fla-core is faster for the promise
    call: Any = kda.fused_recurrent_kda if row.recurrent else kda.chunk_kda
    return lambda **inputs: call(**inputs, **more)[0]


def measure(row: Row, library: str) -> Found:
    """First right, then fast: errors, ms, and memory of forward and backward together."""
    if (library == "fla-core" and not row.peer) or (library == "triton" and row.recurrent):
        return {}
    call, inputs = fla(row), row.inputs()
    do = inputs.pop("do")
    cotangent = do if row.differentiable else None
    results = suite.results(call, inputs, cotangent)
    few = {name: _few_heads(row, x) for name, x in results.items()}
    del results
    exact = in_fp64(row, {name: _few_heads(row, x) for name, x in {**inputs, "do": do}.items()})
    found: Found = {"errors": suite.errors(few, {name: exact[name] for name in few})}
    del few, exact
    if cotangent is not None:
        found["memory"] = suite.extra_memory(lambda: suite.results(call, inputs, do))
    if library == "ours" and row.name.endswith(_COUNTED):
        found["compiled again"] = compiled_again(row)
    return found | suite.times(call, inputs, cotangent)


def _few_heads(row: Row, x: Tensor) -> Tensor:
    """Of [B, T, H, ...] or of a parameter [H · n] what belongs to the first heads."""
    if x.dim() == 1:
        return x[: _HEADS * x.shape[0] // row.H]
    return x[:, :_HEADS] if row.recurrent and x.shape[1] == row.H else x[:, :, :_HEADS]


def in_fp64(row: Row, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """o and every gradient as the textbook has them, a chunk at a time."""
    return suite.in_fp64(functools.partial(_textbook, row), inputs)


def _textbook(row, q, k, v, g, beta, A_log, dt_bias, initial_state=None) -> Tensor:
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q = q * row.D**-0.5
    g, rate = g + dt_bias.view(-1, row.D), A_log.exp()[:, None]
    if row.lower_bound is None:
        g = rate * logsigmoid(-g)  # softplus(x) = −log sigmoid(−x)
    else:
        g = row.lower_bound * torch.sigmoid(rate * g)
    beta = beta.sigmoid()[..., None]
    o = []
    for span in row.spans:
        S = q.new_zeros(()) if initial_state is None else initial_state
        for start in range(span.start, span.stop, _CHUNK):
            chunk = slice(start, min(start + _CHUNK, span.stop))
            tokens = [x[:, chunk].transpose(1, 2) for x in (q, k, v, g, beta)]  # [B, H, C, ·]
            b_o, S = _one_chunk(S, *tokens)
            o.append(b_o.transpose(1, 2))
    return torch.cat(o, 1)


def _one_chunk(S, q, k, v, g, beta) -> tuple[Tensor, Tensor]:
    sums = g.cumsum(-2)
    eye = torch.eye(g.shape[-2], dtype=g.dtype, device=g.device)
    later = (eye.cumsum(0) == 0)[..., None]  # [C, C, 1], where the key comes after the query
    between = sums[..., :, None, :] - sums[..., None, :, :]
    between = between.masked_fill(later, -torch.inf).exp()
    keys = torch.einsum("bhid,bhijd,bhjd->bhij", k, between, k).tril(-1)
    queries = torch.einsum("bhid,bhijd,bhjd->bhij", q, between, k)
    if S.dim() == 0:
        S = S.expand(*k.shape[:2], k.shape[-1], v.shape[-1])
    wanted = beta * (v - (k * sums.exp()) @ S)
    values = torch.linalg.solve_triangular(eye + beta * keys, wanted, upper=False)
    o = (q * sums.exp()) @ S + queries @ values
    last = sums[..., -1:, :]
    return o, last.exp().mT * S + (k * (last - sums).exp()).mT @ values


def compiled_again(row: Row) -> int:
    """Kernels that 100 other lengths and packings compile; a copy to the host is an error."""
    lengths = [2048 + 37 * i for i in range(50)]
    rows = [dataclasses.replace(row, B=1, T=T, H=2) for T in lengths]
    rows += [dataclasses.replace(each, lengths=(37, each.T - 37)) for each in rows]
    calls = [(fla(each), each.inputs()) for each in rows]
    return suite.compiled_again(calls, (0, 49, 50, 99))


def host() -> Found:
    """Of small calls, without gradients, and of one forward and backward."""
    found = {}
    small = Row("", (None, None), T=128)
    step = dataclasses.replace(small, B=8, T=1, H=32, recurrent=True)
    for name, row in (("chunk_kda", small), ("fused_recurrent_kda", step)):
        call, inputs = fla(row), row.inputs()
        do = inputs.pop("do")
        with torch.inference_mode():
            found[name] = suite.wall_clock(functools.partial(call, **inputs))
        if not row.recurrent:
            both = functools.partial(suite.results, call, inputs, do)
            found[f"{name}, backward too"] = suite.wall_clock(both)
    return found


def first_call() -> Found:
    row = Row("", (None, None), T=1024)
    return suite.first_call(fla(row), row.inputs())


def remarks(rows: list[Found]) -> Iterator[str]:
    for row in rows:
        for library in ("ours", "fla-core"):
            each = row.get(library, {})
            if "memory" in each:
                yield f"extra memory, {library}: {each['memory'] / 2**30:.2f} GiB  {row['name']}"
            if "compiled again" in each:
                yield f"compiled again over 100 lengths: {each['compiled again']}  {row['name']}"


SUITE = Suite(
    "kda_gpu",
    ROWS,
    {
        "ours": functools.partial(measure, library="ours"),
        "triton": suite.in_triton(functools.partial(measure, library="triton")),
        "fla-core": functools.partial(measure, library="fla-core"),
    },
    host,
    first_call,
    remarks,
)

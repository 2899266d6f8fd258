"""The softmax engine's suite: ``python -m benchmarks gpu --only attn``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from benchmarks import suite
from benchmarks.suite import Call, Found, Suite

# Elements of a block of logits in fp64
_BLOCK = 2**27


@dataclasses.dataclass(frozen=True)
class Row(suite.Row):
    """One call in bf16.  Its gate is logsigmoid(N(gate, 1))."""

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

    @property
    def group(self) -> int:
        return self.HQ // self.H

    @property
    def differentiable(self) -> bool:
        return not self.decoding

    @property
    def alone(self) -> bool:
        """Whether the row says something of this package only."""
        return self.everything or (self.T > 16384 and not self.decoding)

    def bounds(self) -> Tensor | None:
        """Where packed sequences begin and end."""
        if not self.lengths:
            return None
        return torch.tensor([0, *itertools.accumulate(self.lengths)], device="cuda").int()

    def inputs(self) -> dict[str, Tensor]:
        """q, k, v and do, and with a gate g."""
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(size, generator=generator, device="cuda", dtype=dtype)

        rows = (1, len(self.lengths)) if self.decoding else (self.B, self.T)
        made = {
            "q": draw(*rows, self.HQ, self.D),
            "k": draw(self.B, self.T, self.H, self.D),
            "v": draw(self.B, self.T, self.H, self.D),
            "do": draw(*rows, self.HQ, self.D),
        }
        if self.gate is not None:
            g = draw(self.B, self.T, self.HQ, dtype=torch.float32)
            made["g"] = logsigmoid(g + self.gate)
        return made


def _decoding(name: str, first: float, N: int, keys: int, gate: float | None = None) -> Row:
    return Row(name, (first, None), T=N * keys, lengths=(keys,) * N, gate=gate, decoding=True)


ROWS = (
    Row("parallel_attn B1 T8192 HQ32 H8 D128", (1.25, 4.0)),
    Row("parallel_attn B4 T4096 H16 D64", (0.40, 1.5), B=4, T=4096, HQ=16, H=16, D=64),
    Row("parallel_attn window 1024", (0.36, 1.2), window=1024),
    Row("parallel_forgetting_attn, nothing forgotten", (1.4, 4.6), gate=12.0),
    Row("parallel_forgetting_attn N(4, 1)", (0.80, 2.7), gate=4.0),
    Row("parallel_forgetting_attn N(4, 1), all met", (None, None), gate=4.0, everything=True),
    Row("parallel_forgetting_attn N(4, 1), packed", (0.40, 1.4), gate=4.0, lengths=suite.PACKED),
    _decoding("attn_decoding N64 x 8192 keys", 0.60, 64, 8192),
    _decoding("attn_decoding N1 x 131072 keys", 0.18, 1, 131072),
    _decoding("attn_decoding N16 x 8192 keys, gate", 0.19, 16, 8192, 4.0),
    Row("parallel_forgetting_attn N(0, 1) T16384", (None, None), T=16384, gate=0.0),
    Row("parallel_forgetting_attn N(0, 1) T32768", (None, None), T=32768, gate=0.0),
    Row("parallel_forgetting_attn N(0, 1) T65536", (None, None), T=65536, gate=0.0),
)


def fla(row: Row) -> Call:
    """From the package ``fla`` that this process finds."""
    from fla.ops.attn import parallel_attn
    from fla.ops.attn.decoding import attn_decoding_one_step
    from fla.ops.forgetting_attn import parallel_forgetting_attn

    bounds = row.bounds()
    if row.decoding:
        return functools.partial(attn_decoding_one_step, cu_seqlens=bounds)
    if row.gate is not None:
        return functools.partial(parallel_forgetting_attn, cu_seqlens=bounds)
    return functools.partial(parallel_attn, window_size=row.window)


def torch_sdpa(row: Row, backend: str) -> Call | None:
    """PyTorch's attention on heads-first views, which cost it nothing."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if row.gate is not None or row.window or row.decoding:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            grouped = row.group > 1
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=grouped
            ).transpose(1, 2)

    return run


def flex(row: Row) -> Call | None:
    """FlexAttention, compiled, with a mask of blocks; a gate as a score of its running sum."""
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if row.alone or row.lengths or row.T > 8192:
        return None
    window = row.window or row.T

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    functorch.donated_buffer = False  # the backward pass runs more than once
    mask = create_block_mask(seen, None, None, row.T, row.T, device="cuda")
    attention = torch.compile(flex_attention)
    score, gate = None, row.inputs().get("g")
    if gate is not None:
        sums = gate.cumsum(1).transpose(1, 2).contiguous()  # the time of which does not count

        def score(s, b, h, i, j):
            return s + sums[b, h, i] - sums[b, h, j]

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = attention(q, k, v, score_mod=score, block_mask=mask, enable_gqa=row.group > 1)
        return out.transpose(1, 2)

    return run


CALLS: dict[str, Callable[[Row], Call | None]] = {
    "ours": fla,
    "triton": lambda row: None if row.decoding else fla(row),
    "fla-core": lambda row: None if row.alone else fla(row),
    "cudnn": functools.partial(torch_sdpa, backend="CUDNN_ATTENTION"),
    "flash": functools.partial(torch_sdpa, backend="FLASH_ATTENTION"),
    "flex": flex,
}


def measure(row: Row, library: str) -> Found:
    """First right, then fast: errors, ms, and memory of forward and backward together."""
    call = CALLS[library](row)
    if call is None:
        return {}
    inputs = row.inputs()
    do = inputs.pop("do")
    frozen = library == "flex" and row.gate is not None  # as constants its gates have no gradients
    cotangent = do if row.differentiable and not frozen else None
    with around(row) if library in ("ours", "triton") else contextlib.nullcontext():
        results = suite.results(call, inputs, cotangent)
        few = {name: _few_heads(row, x) for name, x in results.items()}
        exact = in_fp64(row, {name: _few_heads(row, x) for name, x in {**inputs, "do": do}.items()})
        found: Found = {"errors": suite.errors(few, {name: exact[name] for name in few})}
        if cotangent is not None:
            found["memory"] = suite.extra_memory(lambda: suite.results(call, inputs, do))
            o, *gradients = (x.numel() * x.element_size() for x in results.values())
            lse = 4 * do[..., 0].numel()
            found["memory at most"] = o + lse + 3 * sum(gradients)
        del results, few, exact
        return found | suite.times(call, inputs, cotangent)


def around(row: Row) -> contextlib.AbstractContextManager[None]:
    """In what this package's calls are to run."""
    if not row.everything:
        return contextlib.nullcontext()
    from fla.ops.attn.blocks import nothing_left_out

    return nothing_left_out()


def _few_heads(row: Row, x: Tensor) -> Tensor:
    """The heads [B, T, heads, ...] that are compared with fp64: all, or one key head's."""
    key_heads = row.H if row.T <= 8192 else 1
    return x[:, :, : key_heads * x.shape[2] // row.H]


def in_fp64(row: Row, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """o and every gradient as the textbook has them, some queries at a time."""
    wide = {name: x.double() for name, x in inputs.items()}
    made = {"o": torch.empty_like(wide["do"])}
    made |= {f"d{name}": torch.zeros_like(x) for name, x in wide.items() if name != "do"}
    lengths = row.lengths or (row.T,)
    stops = itertools.accumulate(lengths)
    sequences = [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    for b, (n, keys) in itertools.product(range(row.B), enumerate(sequences)):
        queries = slice(n, n + 1) if row.decoding else keys
        of = {"q": queries, "do": queries, "o": queries, "dq": queries}
        parts = {name: x[b, of.get(name, keys)] for name, x in (wide | made).items()}
        _one_sequence(row, **parts)
    return made


def _one_sequence(row, q, k, v, do, o, dq, dk, dv, g=None, dg=None) -> None:
    """Write o and add to the gradients of one sequence, its queries at its last positions."""
    keys, heads = k.shape[0], q.shape[1]
    scale = row.D**-0.5
    sums = dsums = None
    if g is not None:
        sums, dsums = g.cumsum(0), torch.zeros_like(g)
    k, v = (x.repeat_interleave(row.group, 1) for x in (k, v))
    step = max(_BLOCK // (keys * heads), 1)
    for start in range(0, q.shape[0], step):
        b = slice(start, start + step)
        i = torch.arange(keys - q.shape[0], keys, device=q.device)[b]
        j = slice(max(int(i[0]) + 1 - (row.window or keys), 0), int(i[-1]) + 1)
        seen = i[:, None] - torch.arange(j.start, j.stop, device=q.device)
        seen = (seen >= 0) & (seen < (row.window or keys))
        s = scale * torch.einsum("ihd,jhd->hij", q[b], k[j])
        if sums is not None:
            s += sums[i].T[:, :, None] - sums[j].T[:, None, :]
        p = s.masked_fill_(~seen, -torch.inf).softmax(-1)
        o[b] = torch.einsum("hij,jhd->ihd", p, v[j])
        if row.decoding:
            continue
        ds = torch.einsum("ihd,jhd->hij", do[b], v[j])
        ds = ds.sub_((do[b] * o[b]).sum(-1).T[:, :, None]).mul_(p)
        dq[b] = scale * torch.einsum("hij,jhd->ihd", ds, k[j])
        for into, left, right, factor in ((dk, ds, q, scale), (dv, p, do, 1.0)):
            added = factor * torch.einsum("hij,ihd->jhd", left, right[b])
            into[j] += added.unflatten(1, (-1, row.group)).sum(2)
        if dsums is not None:
            dsums[i] += ds.sum(2).T
            dsums[j] -= ds.sum(1).T
    if dsums is not None:
        dg += dsums.flip(0).cumsum(0).flip(0)


def host() -> Found:
    """Of small calls, without gradients, and of one forward and backward."""
    row = Row("", (None, None), T=128, HQ=4, H=2, D=64)
    forgetting = dataclasses.replace(row, gate=4.0)
    decoding = dataclasses.replace(row, T=256, lengths=(128, 128), decoding=True)
    names = {
        "parallel_attn": row,
        "parallel_forgetting_attn": forgetting,
        "attn_decoding": decoding,
    }
    found = {}
    for name, each in names.items():
        call, inputs = fla(each), each.inputs()
        do = inputs.pop("do")
        with torch.inference_mode():
            found[name] = suite.wall_clock(functools.partial(call, **inputs))
        if each.differentiable:
            both = functools.partial(suite.results, call, inputs, do)
            found[f"{name}, backward too"] = suite.wall_clock(both)
    return found


def first_call() -> Found:
    row = Row("", (None, None), T=1024, gate=4.0)
    return suite.first_call(fla(row), row.inputs())


def remarks(rows: list[Found]) -> Iterator[str]:
    for row in rows:
        ours, flash = row.get("ours", {}), row.get("flash", {})
        if "memory" in ours:
            share = ours["memory"] / ours["memory at most"]
            yield f"extra memory / (o + lse + 3 × gradients): {share:.2f}  {row['name']}"
        if "errors" in ours and "errors" in flash:
            ratios = (f"{x} {y / flash['errors'][x]:.4f}" for x, y in ours["errors"].items())
            yield f"error / Flash's on the same inputs: {', '.join(ratios)}  {row['name']}"
    linear = [row for row in rows if "N(0, 1) T" in row["name"] and "forward" in row["ours"]]
    for short, long in itertools.pairwise(linear):
        growth = (long["ours"][x] / short["ours"][x] for x in ("forward", "backward"))
        yield f"time of T{long['T']} / T{short['T']}: " + " / ".join(f"{x:.2f}" for x in growth)


SUITE = Suite(
    "softmax_gpu",
    ROWS,
    {
        **{name: functools.partial(measure, library=name) for name in CALLS},
        "triton": suite.in_triton(functools.partial(measure, library="triton")),
    },
    host,
    first_call,
    remarks,
    around=around,
)

"""What the first kernel of a chunked call leaves for the others, by its definition, in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fla.ops.common.workspace import as_tensor
from fla.ops.kda import triton as portable
from fla.ops.kda.engine import Options
from fla.ops.kda.gate import Gate
from fla.ops.kda.launches import Call

C, TILE, ROOM = 64, 16, 116.0
EXACT = ("decay", "betas", "factors")
# one rounding to bf16, and products of two such operands
BOUNDS = dict.fromkeys(EXACT, 1e-5) | dict.fromkeys(("q_in", "k_in", "k_out"), 2.5e-3)
BOUNDS |= {"M": 5e-3, "A": 5e-3, "near": 0.0, "above": 0.0}


def operands(T, K, gate="bound", H=1, HV=None, B=1, dtype=torch.bfloat16, device="cpu"):
    """Operands of a call without a state, in bf16, with gates in ``dtype``."""
    torch.manual_seed(T + K)
    HV = HV or H
    q, k, v, g = (torch.randn(B, T, n, K, device=device) for n in (H, H, HV, HV))
    beta = torch.randn(B, T, HV, device=device)
    A_log = (torch.rand(HV, device=device) * 15 + 1).log()
    dt_bias = torch.randn(HV * K, device=device)
    options = Options(K**-0.5, 64, qk_l2norm=True, gate=True, lower_bound=-5.0, beta_sigmoid=True)
    if gate == "softplus":
        options = options._replace(lower_bound=None, neg_eigval=True)
    elif gate in ("mixed", "growing"):
        A_log = dt_bias = None
        options = Options(K**-0.5, 64)
        k = torch.nn.functional.normalize(k, dim=-1)
        beta = beta.sigmoid()
        draw = torch.rand_like(g)
        steep = torch.where(draw < 0.01, -1e4, torch.where(draw < 0.02, -80.0, -0.05 * g.abs()))
        g = 0.1 * g if gate == "growing" else torch.where(draw < 0.3, steep, -1e-6)
    q, k, v, beta = (x.to(torch.bfloat16) for x in (q, k, v, beta))
    return [q, k, v, g.to(dtype), beta, A_log, dt_bias], options


def call_of(make, arguments, options, bounds=None) -> tuple[Call, Tensor]:
    """A call of class ``make`` with its workspaces, full of NaN, and room for M and A."""
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=arguments[0].device)
    call = make(*arguments, cu_seqlens, options)
    call.take(portable.kept(arguments[0], arguments[2], cu_seqlens, options))
    for x in (call.pairs, call.operands, call.decay, call.betas, call.factors):
        as_tensor(x).fill_(torch.nan)
    return call, as_tensor(call.pairs)


def chunks(call, bounds) -> Iterator[tuple[int, int, int, int]]:
    """Of every chunk its slot, its row of the batch, and its first token and that behind it."""
    for n in range(call.N):
        first, last = (0, call.T) if bounds is None else bounds[n : n + 2]
        slot = n * -(-call.T // C) if bounds is None else first // C + n
        for i, at in enumerate(range(first, last, C)):
            yield slot + i, n if bounds is None else 0, at, min(at + C, last)


def defined(call, row: int, first: int, last: int) -> dict[str, Tensor]:
    """A chunk's operands by value head, M and A whole, and ``near``."""
    o, tokens = call.options, slice(first, last)

    def padded(x, heads):
        x = x[row, tokens].double().repeat_interleave(call.HV // heads, 1)
        return torch.cat([x, x.new_zeros(C - len(x), *x.shape[1:])]).transpose(0, 1)

    g, beta = call.g[row : row + 1].double(), call.beta.double()
    if o.gate:
        A_log, dt_bias = (None if x is None else x.double() for x in (call.A_log, call.dt_bias))
        g = Gate(call.HV, call.K, A_log, dt_bias, o.lower_bound, torch.float64).decay(g)
    if o.beta_sigmoid:
        beta = beta.sigmoid() * (2 if o.neg_eigval else 1)
    q, k = padded(call.q, call.H), padded(call.k, call.H)  # [HV, C, K]
    g = torch.cat([g[0, tokens], g.new_zeros(C - (last - first), *g.shape[2:])]).transpose(0, 1)
    factors = torch.stack([torch.rsqrt((x * x).sum(-1) + 1e-6) for x in (q, k)], 1)
    if not o.qk_l2norm:
        factors = torch.ones_like(factors)
    q, k = (x * factors[:, i, :, None] for i, x in enumerate((q, k)))
    q = q * o.scale
    sums = g.cumsum(1)
    lower = torch.ones(C, C, device=g.device).tril()[..., None] > 0
    between = torch.where(lower, sums[:, :, None] - sums[:, None], -math.inf).exp()
    own = (g / math.log(2)).unflatten(1, (-1, TILE)).cumsum(2).abs()
    return {
        "q_in": q * sums.exp(),
        "k_in": k * sums.exp(),
        "k_out": k * between[:, -1],
        "decay": sums[:, -1].exp(),
        "betas": padded(beta, call.HV),
        "factors": factors,
        "M": torch.einsum("hik,hjk,hijk->hij", q, k, between),
        "A": torch.einsum("hik,hjk,hijk->hij", k, k, between),
        "near": (own <= ROOM).all(-1).long().cumprod(2).sum(2),
    }


def errors(call, pairs: Tensor, bounds=None, halved: bool = False) -> dict[str, float]:
    """Relative errors; of ``near``, and of M ``above`` its diagonal, how many entries are wrong.

    M and A count between blocks, and within them where rows are near, unless those that are not
    have been ``halved``; A below its diagonal.
    """
    norms: dict[str, list[float]] = {name: [0.0, 0.0] for name in BOUNDS}
    block = torch.arange(C, device=pairs.device) // TILE
    for slot, *at in chunks(call, bounds):
        wanted = defined(call, *at)
        near = torch.arange(TILE, device=pairs.device) < wanted["near"][..., None]
        apart = (block[:, None] != block) | near.flatten(1)[..., None] | halved
        for name, x in wanted.items():
            whole = (
                pairs["MA".index(name)] if name in ("M", "A") else as_tensor(getattr(call, name))
            )
            y = whole[slot].double()
            if name in ("M", "A"):
                norms["above"][0] += y.triu(1).count_nonzero().item()
                seen = apart.tril(0 if name == "M" else -1)
                x, y = (torch.where(seen, each, 0.0) for each in (x, y))
            if name == "near":
                norms[name][0] += (x != y).sum().item()
            else:
                norms[name][0] += (x - y).square().sum().item()
                norms[name][1] += x.square().sum().item()
    return {name: math.sqrt(a / b) if b else a for name, (a, b) in norms.items()}

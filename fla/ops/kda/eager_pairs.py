"""A run of chunks of the delta engine in PyTorch: their operands, and their tokens to one another.

Pairs are found by halving: in every block of 2s tokens the queries of the second half meet the keys
of the first, for s = 1, 2, 4, …  The decay of such a pair goes over the boundary between the halves
and is a product of two, one for the query and one for the key, both at most 1 where gates forget.
Each exponent is the sum of its own segment of g: nothing is ever subtracted, so that a decay of
−1e4 disturbs neither one of −0.05 beside it nor a gradient.  The inverse X grows along the same
halves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fla.ops.common.finite import apart


def _half(exponent: Tensor) -> Tensor:
    """exp(exponent / 2), to be applied twice.

    A gate may grow.  Half of the exponent stays finite for as long as the product can, and what
    grows beyond all numbers becomes the largest, so that 0 · inf never turns a result that is
    representable into NaN.
    """
    return (exponent * 0.5).clamp_(max=math.log(torch.finfo(exponent.dtype).max) - 1).exp_()


def _twice(x: Tensor, half: Tensor) -> Tensor:
    largest = torch.finfo(x.dtype).max
    return (x * half).mul_(half).clamp_(-largest, largest)


def _halvings(C: int) -> Iterator[int]:
    """s = 1, 2, 4, … where 2s tokens still fit into a chunk."""
    s = 1
    while s < C:
        yield s
        s *= 2


def _halves(x: Tensor, s: int) -> Tensor:
    """x [.., C, D] as blocks of two halves of s tokens, [.., C / 2s, 2, s, D]."""
    return x.unflatten(-2, (x.shape[-2] // (2 * s), 2, s))


def _blocks(x: Tensor, s: int) -> Tensor:
    """The blocks of 2s on the diagonal of x [.., C, C], by halves: [.., C / 2s, 2, s, 2, s]."""
    blocks = x.shape[-1] // (2 * s)
    x = x.unflatten(-1, (blocks, 2, s)).unflatten(-4, (blocks, 2, s))
    return x.diagonal(dim1=-6, dim2=-3).movedim(-1, -5)


def causal(lower: Tensor, x: Tensor) -> Tensor:
    """lower @ x with ``lower`` [.., C, C] zero above the diagonal.

    No token sees anything of a later one, not even that it overflowed (0 · inf).
    """
    x, overflowed = apart(x)
    return lower @ x if overflowed is None else (lower @ x).add_(overflowed)


@dataclasses.dataclass
class Run:
    """The operands of a run of chunks, [slots, X, C, ·] with X = lanes · HV, and their decays."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor  # [slots, X, C, 1 or V]
    raw: tuple[Tensor, ...]  # q, k, v, g, beta before they were activated
    missing: Tensor | None  # [slots, lanes, 1, C, 1], where a gate must not decay

    def __post_init__(self):
        prefix, suffix = self.g.clone(), torch.zeros_like(self.g)
        self.decays = []  # for each s, of both halves to the boundary between them
        for s in _halvings(self.g.shape[-2]):
            before, after = _halves(prefix, s).unbind(-3)
            rest, _ = _halves(suffix, s).unbind(-3)
            self.decays.append(_half(torch.stack((rest, after), -3)))
            rest += after[..., -1:, :]
            after += before[..., -1:, :]
        self._into, self._out = _half(prefix), _half(suffix)

    def into(self, x: Tensor) -> Tensor:
        """x [.., C, D] decayed from the state before the chunk to each token."""
        return _twice(x, self._into)

    def out(self, x: Tensor) -> Tensor:
        """x [.., C, D] decayed from each token to the state after the chunk."""
        return _twice(x, self._out)

    def whole(self, state: Tensor, at=slice(None)) -> Tensor:
        """A state [.., K, V] decayed over the chunk."""
        return _twice(state, self._into[at, ..., -1, :, None])


class Pairs:
    """What the tokens of a chunk have to do with each other.

    ``keys`` A, ``queries`` M and ``solver`` X, all [slots, X, C, C].
    """

    def __init__(self, x: Run):
        self.x = x
        C = x.k.shape[-2]
        self.keys = x.k.new_zeros(*x.k.shape[:-1], C)
        self.queries = torch.zeros_like(self.keys)
        self.solver = torch.zeros_like(self.keys)
        self.queries.diagonal(dim1=-2, dim2=-1).copy_((x.q * x.k).sum(-1))
        self.solver.diagonal(dim1=-2, dim2=-1).fill_(1)
        for level, s in enumerate(_halvings(C)):
            k0, k1, q1 = self._operands(level, s)
            keys = k1 @ k0.mT  # [.., C / 2s, s, s]
            _blocks(self.keys, s)[..., 1, :, 0, :] = keys
            _blocks(self.queries, s)[..., 1, :, 0, :] = q1 @ k0.mT
            solver = _blocks(self.solver, s)
            first, second = solver[..., 0, :, 0, :], solver[..., 1, :, 1, :]
            keys = keys.mul_(_halves(x.beta, s)[..., 1, :, :])
            solver[..., 1, :, 0, :] = causal(second, keys @ first).neg_()

    def _operands(self, level: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys of the first halves, keys and queries of the second, decayed to the boundary."""
        decay = self.x.decays[level]
        k0, k1 = _twice(_halves(self.x.k, s), decay).unbind(-3)
        return k0, k1, _twice(_halves(self.x.q, s)[..., 1, :, :], decay[..., 1, :, :])

    def backward(self, dqueries, dkeys, dq, dk, dprefix, dsuffix) -> Tensor:
        """Add to dq and dk what comes through the pairs, and return dg.

        ``dprefix`` and ``dsuffix`` are the gradients of the sums of g over the whole chunk, up to
        and after each token; halving takes them down to single tokens.
        """
        x = self.x
        own = dqueries.diagonal(dim1=-2, dim2=-1)[..., None]
        dq.addcmul_(own, x.k)
        dk.addcmul_(own, x.q)
        for level, s in reversed(list(enumerate(_halvings(x.k.shape[-2])))):
            decay = x.decays[level]
            k0, k1, q1 = self._operands(level, s)
            b_dqueries = _blocks(dqueries, s)[..., 1, :, 0, :]
            b_dkeys = _blocks(dkeys, s)[..., 1, :, 0, :]
            dq1, dk1 = b_dqueries @ k0, b_dkeys @ k0
            dk0 = b_dqueries.mT @ q1 + b_dkeys.mT @ k1
            _halves(dq, s)[..., 1, :, :] += _twice(dq1, decay[..., 1, :, :])
            _halves(dk, s).add_(_twice(torch.stack((dk0, dk1), -3), decay))
            before, after = _halves(dprefix, s).unbind(-3)
            rest, _ = _halves(dsuffix, s).unbind(-3)
            before[..., -1, :] += after.sum(-2)
            after[..., -1, :] += rest.sum(-2)
            after += q1 * dq1 + k1 * dk1
            rest += k0 * dk0
        return dprefix

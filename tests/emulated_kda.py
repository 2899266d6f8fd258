"""The delta engine's scans for Hopper, emulated, against the same in a few lines of fp64.

A program for a process of its own, in which Triton interprets: a stand-in for Gluon stays.
"""

from __future__ import annotations

import itertools
from unittest import mock

import kda_calls
import torch
from emulated_gluon import emulated
from torch import Tensor

from fla.ops.kda import launches
from fla.ops.kda.engine import Options
from fla.testing.compare import relative_error

STAGES = "hopper_tiles", "hopper_blocks", "hopper_scan", "hopper"
with emulated("fla.ops.common.hopper", *(f"fla.ops.kda.{name}" for name in STAGES)) as modules:
    *_, scan, hopper = modules
C = 64
H = 2


class Call(hopper.Call):
    """A call in fp32 whose workspaces hold anything."""

    def __init__(self, case: kda_calls.HopperCase, packed: bool):
        B, T = case.shape.B, case.shape.T + 70 * packed  # some of no sequence
        q, v = torch.randn(B, T, H, case.K), torch.randn(B, T, H, case.V)
        ends = torch.tensor([0, *case.lengths]).cumsum(0) if packed else None
        options = Options(1.0, chunk_size=C, state_v_first=case.variant == "v first")
        with mock.patch.object(launches, "_tiles", lambda *_: (torch.float32, case.K, C)):
            super().__init__(q, q, v, q, q[..., 0], None, None, ends, options)
        self.operands = torch.randn(3, self.slots, H, C, case.K) / case.K**0.5
        self.q_in, self.k_in, self.k_out = self.operands
        self.pairs = 0.05 * torch.randn(2, self.slots, H, C, C)
        self.queries, self.solver = self.pairs
        self.decay, self.betas = torch.rand(self.slots, H, case.K), torch.rand(self.slots, H, C)

    def sequences(self) -> list[tuple[int, int, int, int]]:
        """Row, first token, first slot and length of each."""
        if self.cu_seqlens is None:
            return [(n, 0, n * -(-self.T // C), self.T) for n in range(self.N)]
        ends = self.cu_seqlens.tolist()
        return [(0, a, a // C + n, b - a) for n, (a, b) in enumerate(itertools.pairwise(ends))]

    def chunks(self, n: int):
        """Of each chunk its slot, where its tokens lie, and how many there are."""
        row, token, slot, length = self.sequences()[n]
        for i in range(-(-length // C)):
            there = min(C, length - i * C)
            yield slot + i, (row, slice(token + i * C, token + i * C + there)), there

    def of(self, x: Tensor, place, there: int) -> Tensor:
        """A chunk of tokens as [H, C, V], in fp64."""
        padded = torch.zeros(H, C, x.shape[-1], dtype=torch.float64)
        padded[:, :there] = x[place].transpose(0, 1)
        return padded

    def at(self, slot: int):
        wide = (x[slot].double() for x in (self.q_in, self.k_in, self.k_out))
        m, y, decay, beta = (
            x[slot].double() for x in (self.queries, self.solver, self.decay, self.betas)
        )
        return *wide, m, y, decay[:, None], beta[..., None]


def expected(call: Call, do: Tensor, state: Tensor, dstate: Tensor):
    """What scans give, as ``chunk_inter`` says it."""
    o = torch.zeros(call.v.shape, dtype=torch.float64)
    kept = {name: {} for name in ("values", "solved", "states", "dstates")}
    final, dinitial = state.double(), dstate.double()
    for n in range(call.N):
        s, ds = final[n].clone(), dinitial[n].clone()  # [H, V, K]
        chunks = list(call.chunks(n))
        for slot, place, there in chunks:
            q_in, k_in, k_out, m, y, decay, beta = call.at(slot)
            kept["states"][slot] = s
            b_m = call.of(call.v, place, there) - k_in @ s.mT
            w = b_m + y @ (beta * b_m)
            o[place] = (q_in @ s.mT + m @ (beta * w)).transpose(0, 1)[:there]
            s = decay * s + (beta * w).mT @ k_out
            kept["values"][slot] = w
        for slot, place, there in reversed(chunks):
            q_in, k_in, k_out, m, y, decay, beta = call.at(slot)
            kept["dstates"][slot] = ds
            b_do = call.of(do, place, there)
            p = m.mT @ b_do + k_out @ ds.mT
            u = p + y.mT @ (beta * p)
            ds = decay * ds + b_do.mT @ q_in - (beta * u).mT @ k_in
            kept["solved"][slot] = u
        final[n], dinitial[n] = s, ds
    return o, final, dinitial, kept


def check(case: kda_calls.HopperCase) -> None:
    packed = bool(case.shape.lengths)
    torch.manual_seed(0)
    call = Call(case, packed)
    do, o = torch.randn(call.v.shape), torch.full(call.v.shape, torch.nan)
    state, dstate = torch.randn(2, call.N, H, case.V, case.K)
    wanted = expected(call, do, state, dstate)
    if packed:  # what lies behind the sequences is not read
        call.v[:, case.shape.T :] = do[:, case.shape.T :] = torch.nan
    if not call.options.state_v_first:
        state, dstate = state.mT.contiguous(), dstate.mT.contiguous()
    final, dinitial = torch.empty(2, *state.shape)
    with case.as_told(scan):
        call.advance(o, state, final, None)
        call.scans(do, state, dstate, dinitial)
    if not call.options.state_v_first:
        final, dinitial = final.mT, dinitial.mT
    for a, b in zip((o, final, dinitial), wanted, strict=False):
        assert relative_error(a, b) < 1e-5, case
    for name, slots in wanted[3].items():
        for slot, b in slots.items():
            assert relative_error(getattr(call, name).tensor()[slot], b) < 1e-5, (case, name, slot)


def main() -> None:
    torch.set_num_threads(1)
    for case in kda_calls.hopper_cases():
        check(case)
        print(case, flush=True)


if __name__ == "__main__":
    main()

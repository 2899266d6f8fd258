"""The delta engine on Hopper: operands, long scans and gradients; Triton does the rest."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fla.ops.kda import launches
from fla.ops.kda import triton as portable
from fla.ops.kda.hopper_blocks import BV
from fla.ops.kda.hopper_gradients import run_gradients
from fla.ops.kda.hopper_halving import run_halving
from fla.ops.kda.hopper_intra import run_intra
from fla.ops.kda.hopper_scan import run_scan
from fla.ops.kda.hopper_states import run_states

# Scans of fewer elements are short beside the host's time to describe their tensors
SMALLEST = 1 << 24


class Call(launches.Call):
    """A call of which the kernels for Hopper run what they take."""

    def make_operands(self, pairs: bool) -> None:
        if not self._takes_chunks():
            return super().make_operands(pairs)
        run_intra(self, pairs)

    def halve(self) -> None:
        if not self._takes_chunks():
            return super().halve()
        run_halving(self)

    def run_advance(self, segment, columns, state, strides, o, h, final, final_strides) -> None:
        if h is not None or not self._takes_scan(self.v):
            return super().run_advance(segment, columns, state, strides, o, h, final, final_strides)
        run_scan(self, segment, columns, state, strides, final, final_strides, o=o)

    def run_scans(self, segment, columns, do, forward, strides, backward, dstrides) -> None:
        if not self._takes_scan(do):
            return super().run_scans(segment, columns, do, forward, strides, backward, dstrides)
        state, states, _, final = forward
        dstate, _, _, dfinal = backward
        run_scan(
            self, segment, columns, state, strides[0], final, strides[1], do=do, dstate=dstate,
            dstrides=dstrides[0], dfinal=dfinal, dfinal_strides=dstrides[1],
            keep=states is not None,
        )  # fmt: skip

    def across(self, do, dv, dbeta) -> None:
        if not self._takes_gradients():
            return super().across(do, dv, dbeta)
        do = do if do.data_ptr() % 16 == 0 else do.clone()
        self.radial = None
        if self._finishes() and self.options.qk_l2norm:
            shape = self.slots, self.HV, 2, self.C
            self.radial = self.q.new_empty(shape, dtype=torch.float32)
        run_states(self, do, dv, dbeta)

    def within(self, dg) -> tuple[Tensor, Tensor]:
        if not self._takes_gradients():
            return super().within(dg)
        if not self._finishes():
            run_gradients(self, dg, None, None)
            return self.units()
        dq, dk = torch.empty_like(self.q), torch.empty_like(self.k)
        run_gradients(self, dg, dq, dk)
        return dq, dk

    def _takes_chunks(self) -> bool:
        aligned = all(x.data_ptr() % 16 == 0 for x in (self.q, self.k, self.g))
        return aligned and self.dtype == torch.bfloat16 and self.K in (64, 128)

    def _takes_gradients(self) -> bool:
        """One answer for both kernels: the second takes pairs as the first leaves them."""
        return self._takes_chunks() and self.V in (64, 128)

    def _finishes(self) -> bool:
        """Whether these two kernels make dq and dk: value heads that share a key sum theirs."""
        return self.HV == self.H

    def _takes_scan(self, other: Tensor) -> bool:
        return (
            self.B * self.T * self.HV * (self.K + self.V) >= SMALLEST
            and self.dtype == torch.bfloat16
            and self.K in (64, 128)
            and self.V % BV.value == 0
            and self.v.data_ptr() % 16 == other.data_ptr() % 16 == 0
        )


forward = functools.partial(portable.forward, made_by=Call)
backward = functools.partial(portable.backward, made_by=Call)
kept = portable.kept

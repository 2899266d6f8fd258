"""The delta engine on Hopper: the scans of long calls; what it does not take, Triton does."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fla.ops.kda import triton as portable
from fla.ops.kda.hopper_blocks import BV
from fla.ops.kda.hopper_scan import run_scan

# Calls of fewer elements are short beside the host's time to describe their tensors
SMALLEST = 1 << 24


class Call(portable.Call):
    """A call whose scans the kernel for Hopper runs, where it takes them."""

    def run_advance(self, segment, columns, state, strides, o, h, final, final_strides) -> None:
        if h is not None or not self._takes(self.v):
            return super().run_advance(segment, columns, state, strides, o, h, final, final_strides)
        run_scan(self, segment, columns, state, strides, final, final_strides, o=o)

    def run_scans(self, segment, columns, do, forward, strides, backward, dstrides) -> None:
        if not self._takes(do):
            return super().run_scans(segment, columns, do, forward, strides, backward, dstrides)
        state, states, _, final = forward
        dstate, _, _, dfinal = backward
        run_scan(
            self, segment, columns, state, strides[0], final, strides[1], do=do, dstate=dstate,
            dstrides=dstrides[0], dfinal=dfinal, dfinal_strides=dstrides[1],
            keep=states is not None,
        )  # fmt: skip

    def _takes(self, other: Tensor) -> bool:
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

"""Calls that between them use every launch of the softmax engine, with and without each option.

As a program it makes part i of n of them, for compute-sanitizer: ``softmax_calls.py i n``; without
numbers a few small ones, which use every kernel.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from shapes import shape_of, spec_named

from fla.ops.attn import blocks
from fla.testing import OpSpec, Shape
from fla.testing.compare import named_results

# KiB of shared memory that a program may have on GPUs like sm_86, sm_80 and sm_90
LIMITS = (99, 163, 227)
HEADS = {2: ((64, 64), (128, 128), (256, 256), (256, 512)), 4: ((64, 64), (128, 128), (256, 256))}
_ODD_HEADS = ((20, 33), (96, 130), (200, 300))
_DENSE, _PACKED = (300,), (0, 130, 0, 257, 1, 0)
# Gate, window, sink and packing, each with and without each other
_CALLS = (
    ("gate, window, sink", _DENSE),
    ("sink", _DENSE),
    ("gate", _PACKED),
    ("window", _PACKED),
    ("sink", _PACKED),
    ("plain", _DENSE),
)


class Launch(NamedTuple):
    """A call on a GPU with ``limit`` KiB of shared memory, that ``long`` lines may serve or not."""

    name: str
    dtype: torch.dtype
    limit: int
    K: int
    V: int
    variant: str
    lengths: tuple[int, ...]
    group: int = 2
    long: bool = True

    @property
    def spec(self) -> OpSpec:
        return spec_named(self.name)

    @property
    def shape(self) -> Shape:
        return shape_of(self.lengths, K=self.K, V=self.V, group=self.group)

    def on_its_gpu(self):
        """Inside, kernels are launched as there."""

        def choose(call, lines):
            call.long = self.long
            call.shared = self.limit
            return original(call, lines)

        original = blocks.Call.choose
        return mock.patch.object(blocks.Call, "choose", choose)


def training() -> Iterator[Launch]:
    name, (half, single) = "parallel_attn", (torch.bfloat16, torch.float32)
    for dtype, call in itertools.product((half, single), _CALLS[:4]):
        for (K, V), limit in itertools.product(HEADS[dtype.itemsize], LIMITS):
            yield Launch(name, dtype, limit, K, V, *call)
        if dtype == half:
            yield Launch(name, dtype, LIMITS[-1], 128, 128, *call, long=False)
    for dtype, (K, V) in itertools.product((half, single), _ODD_HEADS):
        yield Launch(name, dtype, LIMITS[-1], K, V, *_CALLS[4])
    for call, (K, V) in itertools.product((_CALLS[0], _CALLS[5]), HEADS[2]):
        yield Launch(name, torch.float16, LIMITS[-1], K, V, *call)


def decoding() -> Iterator[Launch]:
    name = "attn_decoding_one_step"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for (K, V), variant in itertools.product(
            (*HEADS[dtype.itemsize], (20, 33)),
            ("plain", "window", "gate", "growth, window, sink"),
        ):
            for group in (5, 1) if variant == "plain" else (5, 40):
                lengths = (0, 700, 1, 0, 64)
                yield Launch(name, dtype, LIMITS[-1], K, V, variant, lengths, group)


def small() -> Iterator[Launch]:
    """Every kernel, with 16-bit and with wider elements."""
    for dtype in (torch.bfloat16, torch.float32):
        for variant, lengths in (("gate, window, sink", (150,)), ("gate", (70, 0, 150))):
            yield Launch("parallel_attn", dtype, LIMITS[-1], 64, 64, variant, lengths)
        decoding = "attn_decoding_one_step"
        yield Launch(decoding, dtype, LIMITS[-1], 64, 64, "growth, window, sink", (300, 0, 1))


def main(part: int | None = None, parts: int = 1) -> None:
    launches = small() if part is None else (*training(), *decoding())
    for launch in itertools.islice(launches, part, None, parts):
        arguments = launch.spec.arguments(launch.shape, launch.variant, launch.dtype, "cuda")
        with launch.on_its_gpu():
            named_results(launch.spec.outputs, arguments, launch.spec.gradients)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

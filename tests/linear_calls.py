"""Calls that between them use every launch of the linear engine, with and without each option.

As a program it makes part i of n of them, for compute-sanitizer: ``linear_calls.py i n``;
without numbers a few small ones.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from shapes import shape_of, spec_named

from fla.ops.simple_gla import blocks, chunk_simple_gla, segments, walk
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from fla.testing import OpSpec, Shape
from fla.testing.compare import named_results

TABLES = (walk.LINES, segments.LINES)
# dtype, K, V and KiB of shared memory that a program may have: between them they meet every line
CASES = (
    (torch.bfloat16, 64, 64, 227),
    (torch.bfloat16, 128, 128, 227),
    (torch.bfloat16, 256, 512, 227),
    (torch.bfloat16, 128, 128, 99),
    (torch.float16, 64, 64, 227),
    (torch.float16, 128, 128, 227),
    (torch.float32, 64, 64, 227),
    (torch.float32, 128, 128, 227),
)
_ODD = (
    (torch.bfloat16, 20, 33, 227),
    (torch.float32, 96, 130, 227),
    (torch.bfloat16, 200, 300, 227),
)
_DENSE, _LONG, _PACKED = (130,), (1000,), (0, 130, 0, 257, 1, 0, 700)
# Operator and variant, lengths
_CALLS = (
    ("chunk_simple_gla", "gate, state", _LONG),
    ("chunk_simple_gla", "gate", _PACKED),
    ("fused_recurrent_simple_gla", "reverse, head gate, v first", _PACKED),
    ("chunk_simple_gla", "plain", _DENSE),
    ("chunk_linear_attn", "normalised, state", _PACKED),
    ("fused_recurrent_linear_attn", "reverse", _LONG),
)


# For the walk on Hopper: operator and variant, lengths, K and V
_HOPPER_CALLS = (
    ("chunk_simple_gla", "gate, state"),
    ("chunk_simple_gla", "gate"),
    ("chunk_simple_gla", "growth"),
    ("chunk_simple_gla", "plain"),
    ("fused_recurrent_simple_gla", "reverse, head gate, v first"),
    ("chunk_lightning_attn", "state"),
    ("fused_recurrent_lightning_attn", "reverse"),
    ("fused_recurrent_simple_gla", "reverse"),
)
_HOPPER_LENGTHS = ((1,), (63,), (64,), (65,), (1000,), _PACKED, (0, 0, 64, 128, 64))
_HOPPER_SIZES = ((128, 128), (64, 64), (64, 128), (128, 64), (256, 512))
_SIZES_IN_TURNS = ((64, 64), (128, 64), (128, 128))


class HopperCase(NamedTuple):
    name: str
    variant: str
    shape: Shape
    segments: bool
    turns: bool = False  # are taken by those who put out
    programs: int = 7  # at once, among which heads are uneven

    @property
    def spec(self) -> OpSpec:
        return spec_named(self.name)


def hopper_cases() -> Iterator[HopperCase]:
    """Every second pair of a call and a length, and every fourth in turns; each size of heads.

    Packed sequences are walked in shares, every second time by heads.
    """
    for i, lengths in enumerate(_HOPPER_LENGTHS):
        for j, call in enumerate(_HOPPER_CALLS):
            if (i + j) % 2 == 0:
                segments = (i + j) % 4 == 0
                K, V = _HOPPER_SIZES[(i + 3 * j) % len(_HOPPER_SIZES)]
                rows = {"B": 1} if segments and len(lengths) == 1 else {}  # segments are of one
                shape = shape_of(lengths, K=K, V=V, **rows)
                programs = shape.H if shape.lengths and j < 4 else 7
                yield HopperCase(*call, shape, segments, programs=programs)
            elif (i + j) % 4 == 1:
                K, V = _SIZES_IN_TURNS[(i + j // 4) % len(_SIZES_IN_TURNS)]
                yield HopperCase(*call, shape_of(lengths, K=K, V=V), segments=False, turns=True)


class Launch(NamedTuple):
    """A call on a GPU with ``limit`` KiB of shared memory, that falls into segments or does not."""

    name: str
    variant: str
    lengths: tuple[int, ...]
    dtype: torch.dtype
    K: int
    V: int
    limit: int
    segments: bool

    @property
    def spec(self) -> OpSpec:
        return spec_named(self.name)

    @property
    def shape(self) -> Shape:
        return shape_of(self.lengths, K=self.K, V=self.V)

    @contextlib.contextmanager
    def on_its_gpu(self) -> Iterator[None]:
        """Inside, kernels are launched as there."""
        with (
            mock.patch.object(blocks, "shared_memory", lambda device: self.limit),
            mock.patch.object(
                blocks, "multiprocessors", lambda device: 132 if self.segments else 1
            ),
        ):
            yield


def launches() -> Iterator[Launch]:
    """Every line of the main dtype with every call, the others with every second one."""
    for i, case in enumerate((*CASES, *_ODD)):
        for j, call in enumerate(_CALLS):
            if i < 3 or (i + j) % 2:
                yield Launch(*call, *case, segments=(i + j // 2) % 2 == 0)


def small() -> Iterator[Launch]:
    """Every kernel, with 16-bit and with wider elements, in segments and not."""
    for dtype, segmented in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        for call in _CALLS:
            yield Launch(*call[:2], (70, 0, 150), dtype, 64, 64, 227, segmented)


def growth_of_nothing(dtype, device="cpu"):
    """q, k, v, g whose weights grow beyond the largest number while values are 0; and o."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 70, 2, 64, generator=generator).to(device, dtype)
    v[:, :62] = 0
    g = torch.full((1, 70, 2), -0.1, device=device)
    g[:, :62] = 3
    inputs = q, k, v, g
    return inputs, naive_recurrent_simple_gla(*(x.double() for x in inputs))[0]


def gates_that_leave_little(steep, dtype, device="cpu"):
    """q, k, v and g of uniform decays, do and dstate; and dg, to which no token's pair with itself,
    and not the last one's with the final state, contributes."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = torch.randn(4, 1, 150, 2, 64, generator=generator).to(device, dtype)
    dstate = torch.randn(1, 2, 64, 64, generator=generator).to(device)
    g = torch.full((1, 150, 2), steep, device=device)
    inputs = [x.double().requires_grad_() for x in (q, k, v, g)]
    results = naive_recurrent_simple_gla(*inputs, output_final_state=True)
    (dg,) = torch.autograd.grad(results, inputs[3:], (do.double(), dstate.double()))
    return (q, k, v, g), (do, dstate), dg


def gradient_of_gates(inputs, cotangents):
    """dg of q, k, v and g."""
    inputs[3].requires_grad_()
    results = chunk_simple_gla(*inputs, output_final_state=True)
    return torch.autograd.grad(results, inputs[3], cotangents)[0]


def main(part: int | None = None, parts: int = 1) -> None:
    calls = small() if part is None else launches()
    for each in itertools.islice(calls, part, None, parts):
        arguments = each.spec.arguments(each.shape, each.variant, each.dtype, "cuda")
        with each.on_its_gpu():
            named_results(each.spec.outputs, arguments, each.spec.gradients)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

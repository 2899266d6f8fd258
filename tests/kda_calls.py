"""Calls that between them use every launch of the delta engine, with and without each option.

As a program it makes part i of n of them, for compute-sanitizer: ``kda_calls.py i n``; without
numbers a few small ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import sanitizer
import torch
from shapes import shape_of, spec_named

from fla.ops.common.dispatch import use
from fla.testing import OpSpec, Shape
from fla.testing.compare import named_results

# KiB of shared memory that a program may have on sm_90
MOST = 227
# dtype, K, V and KiB: between them they meet every line, each with the most channels that it takes
CASES = (
    (torch.bfloat16, 64, 64, MOST),
    (torch.bfloat16, 64, 64, 99),
    (torch.bfloat16, 128, 128, MOST),
    (torch.bfloat16, 128, 128, 163),
    (torch.bfloat16, 128, 128, 99),
    (torch.bfloat16, 256, 512, 99),
    (torch.float32, 64, 64, MOST),
    (torch.float32, 64, 64, 163),
    (torch.float32, 128, 128, 163),
    (torch.float32, 128, 128, 99),
    (torch.float32, 256, 256, MOST),
    (torch.float32, 256, 256, 163),
    (torch.float32, 256, 256, 99),
)
_HEADS = ((64, 64), (128, 128), (256, 512), (20, 33), (96, 130))
_DENSE, _PACKED = (200,), (0, 130, 0, 257, 1, 0)
_FEW, _FEW_PACKED = (3,), (0, 3, 1, 0)
_HOPPER_VARIANTS = ("state", "raw, lower bound, state", "v first", "plain", "growth")
# A few tokens alone eager takes one by one, rounding nothing, which bounds no chunk; and the errors
# of one token are few numbers times its values
_HOPPER_LENGTHS = ((0, *[1] * 6), (63,), (64,), (65,), (500,), _PACKED, (0, 0, 64, 128, 64))
_HOPPER_SIZES = ((128, 128), (64, 64), (64, 128), (128, 64), (128, 256))


class Launch(NamedTuple):
    """A call on a GPU with ``limit`` KiB of shared memory, which may fall into ``segments``.

    Or on a ``newer`` one than Hopper, as far as another can run it.
    """

    name: str
    dtype: torch.dtype
    K: int
    V: int
    variant: str
    lengths: tuple[int, ...]
    group: int = 2
    segments: bool = False
    limit: int = MOST
    newer: bool = False

    @property
    def spec(self) -> OpSpec:
        return spec_named(self.name)

    @property
    def shape(self) -> Shape:
        return shape_of(self.lengths, K=self.K, V=self.V, group=self.group)

    @contextlib.contextmanager
    def as_told(self) -> Iterator[None]:
        """Inside, long sequences fall into segments, or none does, and kernels run as there."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(divided(self.segments))
            if self.limit < MOST:
                stack.enter_context(limited_to(self.limit))
            if self.newer:
                stack.enter_context(of_capability(100))
            if self.limit < MOST or self.newer:  # where there are no kernels for Hopper
                stack.enter_context(use("triton"))
            yield


def limited_to(limit: int):
    """Inside, programs have so many KiB of shared memory."""
    from fla.ops.kda import launches

    return mock.patch.object(launches, "shared_memory", lambda device: limit)


def of_capability(capability: int):
    """Inside, launches are those of sm_``capability``."""
    from fla.ops.kda import launches

    return mock.patch.object(launches, "capability", lambda device: divmod(capability, 10))


def divided(segments: bool):
    """Inside, long sequences fall into segments, or none does."""
    from fla.ops.kda import launches

    many, few = 1, {}
    if segments:
        many, few = 1 << 20, {"SHORTEST_SEGMENT": 1, "FEWEST_SEGMENTS": 2}
    return mock.patch.multiple(launches, multiprocessors=lambda device: many, **few)


def _constant(decay):
    return lambda shape, draw: {
        "g": decay * (1 + 0.1 * draw(shape.B, shape.T, shape.H * shape.group, shape.K).tanh())
    }


def _mixed(shape, draw):
    """All of them side by side, each channel of each token its own."""
    which = draw(shape.B, shape.T, shape.H * shape.group, shape.K)
    edges = torch.tensor([-1.5, -1.0, -0.5, 0.5], dtype=which.dtype)
    decays = torch.tensor([-1e4, -80.0, -5.0, -0.05, -1e-6], dtype=which.dtype)
    return {"g": decays[torch.bucketize(which, edges)]}


def gated(*decays: float) -> OpSpec:
    """``chunk_kda`` with gates around these, or of all sizes mixed, as its variants."""
    variants = {f"{decay:g}": _constant(decay) for decay in decays}
    return dataclasses.replace(spec_named("chunk_kda"), variants=variants | {"mixed": _mixed})


def chunked() -> Iterator[Launch]:
    name = "chunk_kda"
    for K, V in _HEADS:
        yield Launch(name, torch.bfloat16, K, V, "raw, lower bound, state", _DENSE)
        yield Launch(name, torch.bfloat16, K, V, "state", _PACKED)
        yield Launch(name, torch.bfloat16, K, V, "state", _PACKED, segments=True)
    for dtype in (torch.float16, torch.float32):
        yield Launch(name, dtype, 64, 64, "raw, softplus, doubled", _DENSE)
        yield Launch(name, dtype, 128, 128, "v first", _PACKED)
        yield Launch(name, dtype, 128, 64, "chunk 32", _PACKED, group=1, segments=True)
    yield Launch(name, torch.float16, 256, 64, "plain", (70,))
    yield Launch(name, torch.float32, 256, 64, "growth", (70,))
    yield Launch(name, torch.bfloat16, 128, 128, "bound alone", _DENSE, group=1)


def elsewhere() -> Iterator[Launch]:
    """The lines for GPUs that are not Hopper's, and what else is launched there."""
    name = "chunk_kda"
    for dtype, K, V, limit in (*CASES, (torch.float16, 128, 128, 99), (torch.float16, 256, 64, 99)):
        if limit < MOST:
            yield Launch(name, dtype, K, V, "raw, softplus, doubled", _DENSE, limit=limit)
            yield Launch(name, dtype, K, V, "state", _PACKED, segments=True, limit=limit)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for K, variant in itertools.product((64, 128), ("raw, lower bound, state", "plain")):
            yield Launch(name, dtype, K, K, variant, _DENSE, newer=True)


def recurrent() -> Iterator[Launch]:
    variants = ("state", "v first", "raw, lower bound, state", "raw, channel beta")
    for dtype, variant in itertools.product((torch.bfloat16, torch.float32), variants):
        yield Launch("fused_recurrent_kda", dtype, 128, 128, variant, _FEW)
        yield Launch("fused_recurrent_kda", dtype, 96, 130, variant, _FEW_PACKED)
        yield Launch("fused_recurrent_kda_fwd", dtype, 128, 128, variant, _FEW)
    for K, V in ((20, 33), (64, 64), (256, 512)):
        yield Launch("fused_recurrent_kda_fwd", torch.float16, K, V, "v first", _FEW)
        yield Launch("fused_recurrent_kda_fwd", torch.float32, K, V, "state", _FEW_PACKED)


def gates() -> Iterator[Launch]:
    for dtype, K, T in itertools.product(
        (torch.bfloat16, torch.float32), (20, 128), (_FEW, (700,))
    ):
        for variant in ("softplus", "lower bound"):
            yield Launch("fused_kda_gate", dtype, K, K, variant, T)


def small() -> Iterator[Launch]:
    """Every kernel, with 16-bit and with wider elements, in segments and not."""
    yield Launch("chunk_kda", torch.bfloat16, 128, 128, "state", (150,))  # V whole in both scans
    for dtype in (torch.bfloat16, torch.float32):
        for variant, segments in (("raw, lower bound, state", False), ("state", True)):
            yield Launch("chunk_kda", dtype, 64, 64, variant, (70, 0, 150), segments=segments)
        yield Launch("fused_recurrent_kda", dtype, 64, 64, "state", _FEW_PACKED)
        yield Launch("fused_recurrent_kda_fwd", dtype, 64, 64, "state", _FEW)
        yield Launch("fused_kda_gate", dtype, 64, 64, "softplus", _FEW)


class HopperCase(NamedTuple):
    """A call whose scans run on Hopper, in one or two partitions, in segments or whole."""

    variant: str
    lengths: tuple[int, ...]
    K: int
    V: int
    segments: bool
    partitions: int

    @property
    def spec(self) -> OpSpec:
        return spec_named("chunk_kda")

    @property
    def shape(self) -> Shape:
        return shape_of(self.lengths, K=self.K, V=self.V, group=2)

    @contextlib.contextmanager
    def as_told(self, scan):
        """Inside, ``scan``, the module, and what divides sequences do so."""
        with (
            divided(self.segments),
            mock.patch.object(
                scan, "multiprocessors", lambda _: 0 if self.partitions == 2 else 1 << 20
            ),
        ):
            yield


def hopper_cases() -> Iterator[HopperCase]:
    """Every second pair of a variant and a length, with sizes of heads in turn."""
    for i, lengths in enumerate(_HOPPER_LENGTHS):
        for j, variant in enumerate(_HOPPER_VARIANTS):
            if (i + j) % 2 == 0:
                sizes = _HOPPER_SIZES[(i + 3 * j) % len(_HOPPER_SIZES)]
                yield HopperCase(variant, lengths, *sizes, (i + j) % 4 == 0, 1 + j % 2)


def main(part: int | None = None, parts: int = 1) -> None:
    calls = small() if part is None else (*chunked(), *elsewhere(), *recurrent(), *gates())
    for launch in itertools.islice(calls, part, None, parts):
        arguments = launch.spec.arguments(launch.shape, launch.variant, launch.dtype, "cuda")
        with launch.as_told():
            named_results(launch.spec.outputs, arguments, launch.spec.gradients)
        torch.cuda.synchronize()


if __name__ == "__main__":
    with sanitizer.workspaces_apart():
        main(*map(int, sys.argv[1:]))

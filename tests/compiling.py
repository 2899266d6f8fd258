"""Compile what a call would launch, for a GPU that need not be there."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Inside, launches on CPU tensors compile their kernels for sm_``capability`` and run nothing.

    Yields a list that fills with what is compiled, each kernel and specialisation once.
    """
    compiled: list[Any] = []
    known = set()

    def run(kernel, *args, grid, warmup, **kwargs):
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for parameter in kernel.params:
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = _POINTERS[value.dtype]
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
            elif isinstance(value, TensorDescriptor):
                element = _POINTERS[value.base.dtype][1:]
                tile = f"{element}{value.block_shape},{value.layout!r}"
                signature[parameter.name] = f"tensordesc<{tile}>"
            else:
                # another value must not want another kernel
                assert parameter.do_not_specialize or not isinstance(value, int), parameter.name
                signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
        key = kernel.fn, repr((signature, constants, options))
        if key not in known:
            known.add(key)
            make = GluonASTSource if kernel.is_gluon() else ASTSource
            source = make(kernel, signature, constants, attributes)
            target = GPUTarget("cuda", capability, 32)
            compiled.append(triton.compile(source, target=target, options=options))
            if kernel.is_gluon():
                _check_barriers(compiled[-1])

    with mock.patch.object(JITFunction, "run", run):
        yield compiled


def _check_barriers(kernel: Any) -> None:
    """They lie side by side behind all else.

    One that nobody uses would have the memory of something else, and that the barrier's beginning.
    """
    ptx = kernel.asm["ptx"]
    places = dict(re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx))
    begun = re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(\S+)\]", ptx)
    # what has no offset is where shared memory begins
    at = sorted(int(places.get(each, 0)) for each in begun)
    gaps = [y - x for x, y in itertools.pairwise([*at, kernel.metadata.shared] if at else [])]
    assert all(0 < gap <= 32 for gap in gaps), at


def overtaken(kernel: Any) -> list[str]:
    """Tiles that a product in flight may read while a copy for a later turn of its loop arrives.

    With so many copies ahead of the loop, a product that is waited for a turn later wants one stage
    more.  Triton 3.6 forgets it where a tile is also read in another way.
    """
    tiles: dict[str, str] = {}  # where a view comes from
    stages: dict[str, int] = {}
    copies: dict[str, int] = {}
    loops: list[tuple[int, dict[str, int]]] = []  # how deep, and the copies before
    flying: list[list[str]] = []  # the tiles of products of this turn that nobody has waited for
    found = []
    for line in kernel.asm["ttgir"].splitlines():
        depth = len(line) - len(line.lstrip())
        while loops and depth <= loops[-1][0]:
            loops.pop()
        if "scf.for" in line:
            loops.append((depth, dict(copies)))
            flying = []
        if made := re.match(r"\s*(%\w+) = ttg\.local_alloc : .*memdesc<(\d+)x\d+x\d+x", line):
            tiles[made[1]], stages[made[1]] = made[1], int(made[2])
        elif view := re.match(r"\s*(%\w+) = ttg\.memdesc_\w+ (%\w+)", line):
            tiles[view[1]] = tiles.get(view[2], "")
        elif copy := re.search(r"async_copy_global_to_local \S+ (%\w+)", line):
            tile = tiles.get(copy[1], "")
            if loops and tile in stages and stages[tile] <= loops[-1][1].get(tile, 0):
                found += [tile for operands in flying if tile in operands]
            copies[tile] = copies.get(tile, 0) + 1
        elif product := re.search(r"warp_group_dot (%\w+), (%\w+), .*isAsync = true", line):
            flying.append([tiles.get(operand, "") for operand in product.groups()])
        elif wait := re.search(r"warp_group_dot_wait.*pendings = (\d+)", line):
            flying = flying[max(len(flying) - int(wait[1]), 0) :]
    return found


def before_arrivals(kernel: Any) -> set[str]:
    """What stands before arrivals at barriers in PTX, of barriers and waits for products."""
    order = re.findall(
        r"wgmma\.wait_group\S* \d|bar\S*\.sync|mbarrier\.arrive\.shared", kernel.asm["ptx"]
    )
    # several arrivals may follow one barrier
    return {first for first, each in itertools.pairwise(order) if each == "mbarrier.arrive.shared"}


def dumped(kernel: Any, directory: Path, *what: str) -> str:
    """What cuobjdump tells of a compiled kernel: ``-res-usage``, ``-sass``."""
    binary = directory / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, *what, str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def under_way(code: str) -> list[str]:
    """Loads from shared memory that may not have arrived where a place there is given back.

    Barriers do not wait for them, and a copy may overtake them.  What counts is what was under way
    when the warps met, after which one of them gives back for all.  ``code`` is what ``-sass``
    tells, and is followed from one jump to the next: the upper word of an instruction has from bit
    46 on the counter, if any, that says when its result is there, and from bit 52 on a bit for each
    of six counters that it waits for.
    """
    found: dict[str, str] = {}
    loads: dict[int, tuple[str, str]] = {}  # the last one that a counter speaks of
    met: dict[int, tuple[str, str]] = {}  # those when the warps have met
    line = r"/\*([0-9a-f]{4,})\*/ +(.*?);.*\n.*/\* 0x([0-9a-f]{16}) \*/"
    for place, text, word in re.findall(line, code):
        counter, awaited = int(word, 16) >> 46 & 7, int(word, 16) >> 52
        loads = {i: load for i, load in loads.items() if not awaited >> i & 1}
        if "BAR.SYNC" in text:
            met = loads
        elif "PHASECHK" in text:  # a wait, behind which nobody gives back what was left before
            met = {}
        elif re.search(r"SYNCS\.ARRIVE.*(A1T0|ART0)", text):  # but not who announces bytes
            found |= (*met.values(), *loads.values())
        elif counter < 6 and (load := re.search(r"\bLDSM?\S*", text)):
            loads = loads | {counter: (place, load[0])}
        if re.match(r"EXIT|BRA|RET", text):  # what follows is jumped to
            loads = met = {}
    return list(found.values())


def usage_of(kernel: Any, directory: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", dumped(kernel, directory, "-res-usage"))
    assert found is not None
    return int(found[1]), int(found[2])

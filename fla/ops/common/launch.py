"""Launching a kernel again without what Triton does anew at every launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from fla.ops.common.lacking import begins_anew, gathering
from fla.ops.common.workspace import as_tensor

# A compiled kernel, the values of its constants and the grid
Found = tuple[Any, tuple[Any, ...], tuple[int, ...]]
# Compiled kernels, and the values of their constants in the order of their parameters
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def _kind(x: Any) -> Any:
    """What of a number, or of a tensor in tiles, a kernel is compiled for.

    How tiles lie in shared memory follows from that for each parameter.
    """
    tile = getattr(x, "block_shape", None)
    return type(x) if tile is None else (x.base.dtype, *tile)


def _observed() -> bool:
    """Whether somebody, a profiler say, wants to hear from Triton of every launch."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def launch(
    kernel: Any,
    programs: int | tuple[int, int],
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    constants: dict[str, Any],
) -> Found | None:
    """Launch ``programs`` programs of ``kernel``, in one dimension or two, where tensors[0] is.

    Its parameters stand in the order given here; tensors may be parts of workspaces, and
    descriptors of tiles are among the numbers.  Returns what was found, if something was.

    Triton looks at every argument of a launch for all that a kernel may be compiled for, which
    takes the host longer than to launch what it finds.  Here little tells calls apart: integers are
    below 2^31 and named in ``do_not_specialize``, and tensors, or None, begin at multiples of 16
    bytes; where one does not, Triton looks.

    Once a kernel of an operator's call is missing, the call launches nothing more (``lacking``).
    """
    device = tensors[0].get_device()
    if device >= 0 and device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            launch(kernel, programs, tensors, numbers, constants)
        return None
    grid = (programs, 1, 1) if isinstance(programs, int) else (*programs, 1)
    # Asked for addresses by Triton, the driver would look each of them up
    addresses: list[int | None] = []
    dtypes: list[torch.dtype | None] = []
    bits = 0
    for x in tensors:
        if x is None:
            addresses.append(None)
            dtypes.append(None)
        else:
            address = x.data_ptr()
            addresses.append(address)
            dtypes.append(x.dtype)
            bits |= address
    aligned = bits % 16 == 0
    key = (kernel.fn, device, *dtypes, *map(_kind, numbers), *constants, *constants.values())
    known = _compiled.get(key) if aligned else None
    if known is not None:
        found = *known, grid
        _run(found, device, addresses, numbers)
        return found
    arguments = *map(as_tensor, tensors), *numbers
    lacks = gathering()
    if lacks is not None and (aligned or lacks) and isinstance(kernel, JITFunction):
        lacks.append(functools.partial(kernel.warmup, *arguments, grid=grid, **constants))
        return None
    compiled = kernel[grid](*arguments, **constants)
    if aligned and compiled is not None:  # the interpreter compiles nothing
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)
    return None


class Relaunch:
    """A launch that calls of the same shapes, dtypes and devices make again and again.

    All but tensors is the same then, and what Triton compiled is found once: for a step of decoding
    the host takes longer to describe a launch than the GPU takes for it.
    """

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[Any, ...], constants: dict[str, Any]
    ):
        self._what = kernel, programs, numbers, constants
        self._found: Found | None = None

    def __call__(self, *tensors: Any) -> None:
        kernel, programs, numbers, constants = self._what
        if not programs or (self._found is not None and _again(self._found, tensors, numbers)):
            return
        self._found = launch(kernel, programs, tensors, numbers, constants)


def _again(found: Found, tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> bool:
    """Launch what was found; not where a tensor begins elsewhere than that takes for granted, or
    lies on another GPU than the current one."""
    device = tensors[0].get_device()
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    bits = 0
    for address in addresses:
        bits |= address or 0
    if bits % 16 or 0 <= device != torch._C._cuda_getDevice():
        return False
    _run(found, device, addresses, numbers)
    return True


def _run(found: Found, device: int, addresses: list[int | None], numbers: tuple[Any, ...]) -> None:
    if begins_anew():
        return
    compiled, values, grid = found
    if _observed():
        compiled[grid](*addresses, *numbers, *values)
    else:  # what that does, but for what only an observer needs
        compiled.run(
            *grid, torch._C._cuda_getCurrentRawStream(device), compiled.function,
            compiled.packed_metadata, None, None, None, *addresses, *numbers, *values,
        )  # fmt: skip

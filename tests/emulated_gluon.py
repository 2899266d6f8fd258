"""Gluon kernels on the CPU: their Python, over a stand-in for Gluon.

Partitions are threads.  What is asynchronous happens as late as it may: a product reads its tiles
when it is waited for, a store its tile when the next is to be laid there, and a copy arrives some
time after it began, in any order.  So a tile that is left too early, read too early or never
released shows, as a wrong number, NaN or a barrier that nobody passes; an address outside of its
tensor is an IndexError.  Layouts mean nothing here; compiling checks them.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

PATIENCE = 20.0  # seconds at one barrier
_changed = threading.Condition()
_program = types.SimpleNamespace(id=0, count=1, copies=[], failure=None)
_own = threading.local()  # a partition's products and stores that are under way


class Value:
    """A tensor, or a number, with the operators that kernels use."""

    def __init__(self, x: Any):
        self.x = x if isinstance(x, Tensor) else torch.tensor(x)

    dtype = property(lambda self: self.x.dtype)
    shape = property(lambda self: list(self.x.shape))

    type = types.SimpleNamespace(layout=types.SimpleNamespace(parent="layout"))

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        if dtype == "uint32":  # which PyTorch does not compare
            return Value(self.x.long() & 0xFFFFFFFF)
        return Value(self.x.view(dtype) if bitcast else self.x.to(dtype))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.x.reshape([int(size) for size in shape]))

    def permute(self, order: tuple[int, ...]) -> Value:
        return Value(self.x.permute(order))

    def __getitem__(self, at) -> Value:
        return Value(self.x[at])

    def __bool__(self) -> bool:
        return bool(self.x)

    def __index__(self) -> int:
        return int(self.x)

    def __neg__(self) -> Value:
        return Value(-self.x)


def _raw(x: Any) -> Any:
    if isinstance(x, triton.language.constexpr):  # of a module that is not stood in for
        return x.value
    return x.x if isinstance(x, Value) else x


def _divided(a: Any, b: Any) -> Tensor:
    return torch.div(torch.as_tensor(a), b, rounding_mode="trunc")


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "truediv": lambda a, b: a / b,
    "floordiv": _divided,
    "mod": lambda a, b: torch.fmod(torch.as_tensor(a), b),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
for _name, _operator in _OPERATORS.items():

    def _method(self, other, operator=_operator):
        return (
            NotImplemented if isinstance(other, Pointer) else Value(operator(self.x, _raw(other)))
        )

    def _reflected(self, other, operator=_operator):
        return Value(operator(other, self.x))

    setattr(Value, f"__{_name}__", _method)
    setattr(Value, f"__r{_name}__", _reflected)


class Pointer:
    """Addresses inside a tensor."""

    def __init__(self, elements: Tensor, offset: Any = 0):
        self.elements, self.offset = elements, torch.as_tensor(_raw(offset))

    dtype = property(lambda self: types.SimpleNamespace(element_ty=self.elements.dtype))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.elements, self.offset + _raw(offset))

    def at(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Where the mask says so, the addresses; they have to be the tensor's."""
        offset, mask = torch.broadcast_tensors(self.offset, torch.as_tensor(_raw(mask)))
        reached = offset[mask]
        if reached.numel() and not 0 <= reached.min() <= reached.max() < len(self.elements):
            raise IndexError(f"{reached.min()} to {reached.max()} of {len(self.elements)}")
        return torch.where(mask, offset, 0), mask


def load(p: Pointer, mask: Any = True, other: Any = 0) -> Value:
    offset, mask = p.at(mask)
    other = torch.as_tensor(_raw(other)).to(p.elements.dtype)
    if not len(p.elements):
        return Value(other.expand(mask.shape))
    return Value(torch.where(mask, p.elements[offset], other))


def store(p: Pointer, x: Any, mask: Any = True) -> None:
    offset, mask = p.at(mask)
    x = torch.as_tensor(_raw(x)).to(p.elements.dtype).expand(mask.shape)
    p.elements[offset[mask]] = x[mask]


def atomic_add(p: Pointer, x: Any, sem: str, scope: str) -> Value:
    """What was there; programs run one behind the other."""
    old = load(p)
    store(p, old + x)
    return old


def atomic_xchg(p: Pointer, x: Any, sem: str, scope: str) -> Value:
    old = load(p)
    store(p, x)
    return old


class Shared:
    """Shared memory, at first NaN."""

    def __init__(self, x: Tensor):
        self.x = x

    dtype = property(lambda self: self.x.dtype)
    shape = property(lambda self: list(self.x.shape))

    def index(self, i: Any) -> Shared:
        return Shared(self.x[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.x.narrow(dim, start, length))

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.x.view([int(size) for size in shape]))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.x.permute(order))

    def load(self, layout: Any = None) -> Value:
        return Value(self.x.clone())

    def store(self, value: Value) -> None:
        assert value.dtype == self.dtype and value.shape == self.shape
        self.x.copy_(value.x)


class Barrier:
    """Passed when so many have arrived, and all bytes that were announced."""

    def __init__(self):
        self.count = self.missing = self.bytes = self.phase = 0

    def change(self, arrivals: int, more: int) -> None:
        with _changed:
            self.missing -= arrivals
            self.bytes += more
            assert self.count and self.missing >= 0, "more arrive than the barrier was made for"
            if not self.missing and not self.bytes:
                self.missing, self.phase = self.count, self.phase + 1
            _changed.notify_all()

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def wait(self, parity: Any, pred: Any = True) -> None:
        """Until a phase of that parity is over; the one before the first is."""
        if not pred:
            return
        with _changed:
            passed = _changed.wait_for(
                lambda: _program.failure or self.phase % 2 != int(parity), PATIENCE
            )
        if _program.failure or not passed:
            raise TimeoutError("nobody comes to a barrier")


class Barriers:
    def __init__(self, shape: list[int]):
        self.shape = shape
        self.all = [Barrier() for _ in range(int(shape[0]))]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class TensorDescriptor:
    """A tensor in tiles; what lies outside of it is read as zeros and not written."""

    def __init__(self, base: Tensor, shape, strides, block_shape, layout):
        self.base, self.dtype, self.layout = base, base.dtype, layout
        size = base.element_size()
        for each in block_shape:
            size *= int(each)
        self.block_type = types.SimpleNamespace(shape=[int(x) for x in block_shape], nbytes=size)

    def part(self, place: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The tile at ``place`` as slices of the tensor, and of the tile."""
        sizes = zip(map(int, place), self.block_type.shape, self.base.shape, strict=True)
        inside = [(at, min(at + block, size)) for at, block, size in sizes]
        tensor = tuple(slice(first, max(first, last)) for first, last in inside)
        return tensor, tuple(slice(0, each.stop - each.start) for each in tensor)


def copy_in(desc: TensorDescriptor, place: list[Any], barrier: Barrier, tile: Shared) -> None:
    tensor, inside = desc.part(place)
    tile.x.fill_(torch.nan)

    def arrive() -> None:
        tile.x.zero_()
        tile.x[inside] = desc.base[tensor]
        barrier.change(0, -desc.block_type.nbytes)

    with _changed:
        _program.copies.append(arrive)
        _changed.notify_all()


def copy_out(desc: TensorDescriptor, place: list[Any], tile: Shared) -> None:
    tensor, inside = desc.part(place)
    _own.stores.append(lambda: desc.base.__setitem__(tensor, tile.x[inside]))


def store_wait(pendings: int = 0) -> None:
    while len(_own.stores) > pendings:
        _own.stores.pop(0)()


class Product:
    """acc + a @ b, not yet there."""

    def __init__(self, a: Any, b: Shared, acc: Any):
        self.a, self.b, self.acc, self.result = a, b, acc, None

    def finish(self) -> None:
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        self.result = Value(self.a.x.float() @ self.b.x.float() + _raw(acc))


def warpgroup_mma(a, b, acc, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(a, b, acc if use_acc else Value(0.0))
    _own.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, (product,))


def warpgroup_mma_wait(num_outstanding: int = 0, deps: tuple[Any, ...] = ()) -> Any:
    while len(_own.products) > num_outstanding:
        _own.products.pop(0).finish()
    done = [x.result if getattr(x, "result", None) is not None else x for x in deps]
    return done[0] if len(done) == 1 else tuple(done)


def warp_specialize(partitions, warps, registers) -> None:
    """Run partitions side by side until all are done; a failure of one ends the others."""
    assert len(partitions) == len(warps) + 1 == len(registers) + 1
    running = [threading.Thread(target=_guarded, args=each) for each in partitions]
    copier = threading.Thread(target=_guarded, args=(_copy, (running,)))
    for each in (*running, copier):
        each.start()
    for each in (*running, copier):
        each.join()
    if _program.failure:
        raise _program.failure


def _guarded(function: Callable, arguments: tuple[Any, ...]) -> None:
    _own.products, _own.stores = [], []
    try:
        with torch.no_grad():
            function(*arguments)
        assert not _own.products and not _own.stores, "something is never waited for"
    except BaseException as problem:
        with _changed:
            _program.failure = _program.failure or problem
            _changed.notify_all()


def _copy(running: list[threading.Thread]) -> None:
    """Let copies arrive in any order, while partitions run."""
    while any(each.is_alive() for each in running):
        with _changed:
            _changed.wait_for(lambda: _program.copies, 0.001)
            copies, _program.copies = _program.copies, []
        random.shuffle(copies)
        for arrive in copies:
            arrive()


class Kernel:
    """A kernel with its launch; functions that it calls stay what they are."""

    def __init__(self, fn: Callable):
        self.fn, self.parameters = fn, inspect.signature(fn).parameters
        self.arg_names = list(self.parameters)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            del options["num_warps"]
            values = dict(zip(self.arg_names, arguments, strict=False)) | options
            _program.count = grid[0]
            for _program.id in range(grid[0]):
                _program.copies, _program.failure = [], None
                self.fn(**{name: self._argument(name, x) for name, x in values.items()})

        return run

    def _argument(self, name: str, x: Any) -> Any:
        if "constexpr" in str(self.parameters[name].annotation):
            return x
        if isinstance(x, Tensor):
            return Pointer(x.view(-1))
        return Value(x) if isinstance(x, int | float) else x


def jit(function: Callable | None = None, **options: Any) -> Any:
    return Kernel if options else function


class Constant(int):
    value = property(int)


def constexpr(x: Any) -> Any:
    return Constant(x) if isinstance(x, int) else x


def minimum(a: Any, b: Any) -> Value:
    return Value(torch.minimum(*_alike(a, b)))


def maximum(a: Any, b: Any) -> Value:
    return Value(torch.maximum(*_alike(a, b)))


def _alike(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    a, b = torch.as_tensor(_raw(a)), torch.as_tensor(_raw(b))
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def where(m: Any, a: Any, b: Any) -> Value:
    return Value(torch.where(torch.as_tensor(_raw(m)), _raw(a), _raw(b)))


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(shape)
    return Shared(torch.full([int(size) for size in shape], torch.nan, dtype=dtype))


_LAYOUTS = (
    "BlockedLayout",
    "DistributedLinearLayout",
    "DotOperandLayout",
    "NVMMADistributedLayout",
    "NVMMASharedLayout",
    "SliceLayout",
    "SwizzledSharedLayout",
)


def _layout(*_: Any, **__: Any) -> str:
    return "layout"


def _modules() -> dict[str, Any]:
    """What kernels import in place of Gluon."""
    language = types.SimpleNamespace(
        constexpr=constexpr,
        float32=torch.float32,
        float64=torch.float64,
        uint32="uint32",
        int32=torch.int32,
        int64=torch.int64,
        program_id=lambda axis: Value(_program.id),
        num_programs=lambda axis: Value(_program.count),
        arange=lambda start, stop, layout=None: Value(torch.arange(start, stop)),
        zeros=lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, x, dtype, layout=None: Value(torch.full(shape, x, dtype=dtype)),
        zeros_like=lambda x: Value(torch.zeros_like(x.x)),
        to_tensor=Value,
        num_warps=lambda: 4,
        exp2=lambda x: Value(torch.exp2(x.x)),
        log2=lambda x: Value(torch.log2(x.x)),
        sum=lambda x, axis=None: Value(x.x.sum() if axis is None else x.x.sum(axis)),
        max=lambda x, axis: Value(x.x.amax(axis)),
        cdiv=lambda a, b: (a + b - 1) // b,
        where=where,
        minimum=minimum,
        maximum=maximum,
        load=load,
        store=store,
        atomic_add=atomic_add,
        atomic_xchg=atomic_xchg,
        convert_layout=lambda x, layout, assert_trivial=False: x,
        static_range=range,
        thread_barrier=lambda: None,
        allocate_shared_memory=allocate_shared_memory,
        warp_specialize=warp_specialize,
        shared_memory_descriptor=Shared,
        tensor=Value,
        **dict.fromkeys(_LAYOUTS, _layout),
    )
    barriers = types.SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, size: barrier.change(1, size),
        arrive=lambda barrier, count: barrier.change(count, 0),
        wait=lambda barrier, phase, pred=True: barrier.wait(phase, pred),
    )
    copies = types.SimpleNamespace(
        async_copy_global_to_shared=copy_in,
        async_copy_shared_to_global=copy_out,
        store_wait=store_wait,
    )
    hopper = types.SimpleNamespace(
        fence_async_shared=lambda: None,
        mbarrier=barriers,
        tma=copies,
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
    )
    root = "triton.experimental.gluon"
    functions = {"jit": jit, "constexpr_function": lambda function: function}
    return {
        root: types.SimpleNamespace(**functions, language=language),
        f"{root}.language": language,
        f"{root}.language.nvidia": types.SimpleNamespace(hopper=hopper),
        f"{root}.language.nvidia.hopper": hopper,
        f"{root}.nvidia": types.SimpleNamespace(),
        f"{root}.nvidia.hopper": types.SimpleNamespace(TensorDescriptor=TensorDescriptor),
    }


@contextlib.contextmanager
def emulated(*names: str, for_triton: bool = False) -> Iterator[list[Any]]:
    """Yields the modules ``names``, of which each may import those before it, over the stand-in.

    Which is one for Triton too, if they call its functions from kernels in Gluon.
    """
    import triton.experimental
    import triton.language.core as core

    modules = _modules()
    gluon = modules["triton.experimental.gluon"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, modules))
        stack.enter_context(mock.patch.object(triton.experimental, "gluon", gluon, create=True))
        stack.enter_context(mock.patch.object(core, "_aggregate", lambda cls: cls))
        if for_triton:
            stack.enter_context(mock.patch.object(triton, "jit", jit))
            stack.enter_context(mock.patch.object(triton, "language", gluon.language))
        for name in names:
            sys.modules.pop(name, None)
        yield [importlib.import_module(name) for name in names]

"""Gluon kernels on the CPU: their Python, over a stand-in for Gluon.

Partitions are threads.  What is asynchronous happens as late as it may: a product reads its tiles
when it is waited for, a store its tile when the next is to be laid there, and a copy arrives some
time after it began, in any order.  So a tile that is left too early, read too early or never
released shows, as a wrong number, NaN or a barrier that nobody passes; an address outside of its
tensor is an IndexError.  What products and copies read has to be fenced by those who stored it.
Loads arrive at once, which on a GPU they do not.  Layouts mean nothing here; compiling checks them.
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
from emulated_shared import Shared, fence, new, read_asynchronously, unfenced
from emulated_values import Pointer, Value, atomic_add, atomic_xchg, load, raw, store
from torch import Tensor

from fla.ops.common.workspace import Part, as_tensor

PATIENCE = 20.0  # seconds at one barrier
_changed = threading.Condition()
_program = types.SimpleNamespace(id=0, count=1, copies=[], failure=None)
_own = threading.local()  # a partition's products and stores that are under way


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

    def __init__(self, base: Tensor | Part, shape, strides, block_shape, layout):
        self.base, self.dtype, self.layout = as_tensor(base), base.dtype, layout
        size = base.dtype.itemsize
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
    read_asynchronously(tile)
    tensor, inside = desc.part(place)
    _own.stores.append(lambda: desc.base.__setitem__(tensor, tile.x[inside]))


def add_out(desc: TensorDescriptor, place: list[Any], tile: Shared) -> None:
    read_asynchronously(tile)
    tensor, inside = desc.part(place)
    _own.stores.append(lambda: desc.base[tensor].add_(tile.x[inside]))
    _own.adds = True


def store_wait(pendings: int = 0) -> None:
    while len(_own.stores) > pendings:
        _own.stores.pop(0)()


def assembly(text: str, *_: Any, **__: Any) -> None:
    assert text.startswith("cp.async.bulk.wait_group 0;"), f"{text} has no stand-in"
    store_wait()
    _own.adds = False


def copy_elements(tile: Shared, p: Pointer, mask: Any = True) -> None:
    """Arrives when its group is waited for; zeros where the mask says so."""
    tile.x.fill_(torch.nan)
    _own.copies.append(lambda: tile.x.copy_(load(p, mask, 0).x))


def copies_arrive(barrier: Barrier) -> None:
    """What this partition has begun to copy, at a barrier that waits for it from now on."""
    copies, _own.copies = _own.copies, []

    def arrive() -> None:
        for each in copies:
            each()
        barrier.change(1, 0)

    with _changed:
        barrier.missing += 1
        _program.copies.append(arrive)
        _changed.notify_all()


def commit_group() -> None:
    _own.groups.append(_own.copies)
    _own.copies = []


def wait_group(num_outstanding: int = 0) -> None:
    while len(_own.groups) > num_outstanding:
        for arrive in _own.groups.pop(0):
            arrive()


class Product:
    """acc + a @ b, not yet there."""

    def __init__(self, a: Any, b: Shared, acc: Any):
        self.a, self.b, self.acc, self.result = a, b, acc, None

    def finish(self) -> None:
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        self.result = Value(self.a.x.float() @ self.b.x.float() + raw(acc))


def warpgroup_mma(a, b, acc, use_acc: bool = True, is_async: bool = False) -> Any:
    read_asynchronously(a)
    read_asynchronously(b)
    product = Product(a, b, acc if use_acc else Value(0.0))
    _own.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, (product,))


def warpgroup_mma_wait(num_outstanding: int = 0, deps: tuple[Any, ...] = ()) -> Any:
    while len(_own.products) > num_outstanding:
        _own.products.pop(0).finish()
    done = [x.result if getattr(x, "result", None) is not None else x for x in deps]
    return done[0] if len(done) == 1 else tuple(done)


def mma_v2(a: Value, b: Value, acc: Value) -> Value:
    assert a.dtype == b.dtype
    return Value(a.x.float() @ b.x.float() + acc.x)


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
    try:
        with torch.no_grad(), _waited_for():
            function(*arguments)
    except BaseException as problem:
        with _changed:
            _program.failure = _program.failure or problem
            _changed.notify_all()


@contextlib.contextmanager
def _waited_for() -> Iterator[None]:
    """Inside, products, stores and copies of this thread begin, and all of them end."""
    _own.products, _own.stores, _own.copies, _own.groups, _own.adds = [], [], [], [], False
    yield
    left = _own.products or _own.stores or _own.copies or _own.groups or _own.adds
    assert not left, "something is never waited for"


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
            named = {name: x for name, x in options.items() if name in self.parameters}
            values = dict(zip(self.arg_names, arguments, strict=False)) | named
            _program.count = grid[0]
            for _program.id in range(grid[0]):
                _program.copies, _program.failure = [], None
                unfenced.clear()
                with _waited_for():
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
    a, b = torch.as_tensor(raw(a)), torch.as_tensor(raw(b))
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def where(m: Any, a: Any, b: Any) -> Value:
    return Value(torch.where(torch.as_tensor(raw(m)), raw(a), raw(b)))


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(shape)
    return new(dtype, shape)


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
        tensor=Value,
        float32=torch.float32,
        float64=torch.float64,
        bfloat16=torch.bfloat16,
        pointer_type=lambda dtype: dtype,
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
        expand_dims=lambda x, axis: Value(x.x.unsqueeze(axis)),
        broadcast=lambda a, b: tuple(map(Value, torch.broadcast_tensors(a.x, b.x))),
        exp=lambda x: Value(torch.exp(x.x)),
        exp2=lambda x: Value(torch.exp2(x.x)),
        log2=lambda x: Value(torch.log2(x.x)),
        rsqrt=lambda x: Value(torch.rsqrt(x.x)),
        abs=lambda x: Value(x.x.abs()),
        associative_scan=lambda x, axis, plus: Value(x.x.cumsum(axis)),
        sum=lambda x, axis=None: Value(x.x.sum() if axis is None else x.x.sum(axis)),
        max=lambda x, axis: Value(x.x.amax(axis)),
        min=lambda x, axis: Value(x.x.amin(axis)),
        join=lambda a, b: Value(torch.stack((a.x, b.x), -1)),
        split=lambda x: tuple(map(Value, x.x.unbind(-1))),
        cdiv=lambda a, b: (a + b - 1) // b,
        where=where,
        minimum=minimum,
        maximum=maximum,
        load=load,
        store=store,
        atomic_add=atomic_add,
        atomic_xchg=atomic_xchg,
        inline_asm_elementwise=assembly,
        convert_layout=lambda x, layout, assert_trivial=False: x,
        static_range=range,
        thread_barrier=lambda: None,
        allocate_shared_memory=allocate_shared_memory,
        warp_specialize=warp_specialize,
        shared_memory_descriptor=Shared,
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
    ampere = types.SimpleNamespace(
        async_copy=types.SimpleNamespace(
            async_copy_global_to_shared=copy_elements,
            commit_group=commit_group,
            mbarrier_arrive=copies_arrive,
            wait_group=wait_group,
        ),
        mma_v2=mma_v2,
    )
    hopper = types.SimpleNamespace(
        fence_async_shared=fence,
        mbarrier=barriers,
        tma=copies,
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
    )
    root = "triton.experimental.gluon"
    added = {"begin_to_add": add_out}
    functions = {"jit": jit, "constexpr_function": lambda function: function}
    return {
        root: types.SimpleNamespace(**functions, language=language),
        f"{root}.language": language,
        f"{root}.language._core": types.SimpleNamespace(builtin=lambda f: added[f.__name__]),
        f"{root}.language.nvidia": types.SimpleNamespace(hopper=hopper),
        f"{root}.language.nvidia.ampere": ampere,
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

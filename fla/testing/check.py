"""``fla check``: every operator on this machine against the textbook in fp64."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

import torch

from fla.testing import compare
from fla.testing.report import aligned, track
from fla.testing.spec import OpSpec, Shape, all_specs

Errors = dict[str, tuple[float, float]]  # of each output and gradient, and how large it may be
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one operator."""

    spec: OpSpec
    device: str
    dtype: str
    shape: Shape
    variant: str

    def __str__(self) -> str:
        return f"{self.spec} ({self.variant}) {self.shape} {self.dtype} on {self.device}"

    def errors(self) -> Errors:
        return compare.measure(self.spec, self.shape, self.variant, DTYPES[self.dtype], self.device)


def cases() -> list[Case]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        Case(spec, device, dtype, shape, variant)
        for spec in all_specs()
        for device in devices
        for dtype in DTYPES
        for shape in _shapes(spec)
        for variant in spec.variants
    ]


def _shapes(spec: OpSpec) -> Iterator[Shape]:
    group = 2 if spec.grouped else 1
    yield Shape(T=70, K=33, V=20, group=group)
    if spec.packed:
        yield Shape.packed(0, 70, 0, 33, 1, 0, group=group)


def check() -> int:
    """Run every operator on this machine; compare output and gradients with fp64."""
    table: dict[tuple[str, str, str], Errors] = {}
    failures = []
    calls, done = cases(), 0
    try:
        for case in track(calls, lambda case: f"{case.spec} on {case.device}"):
            row = table.setdefault((case.spec.name, case.device, case.dtype), {})
            failures += _failures(case, row)
            done += 1
    except KeyboardInterrupt:  # behind which comes what has been checked
        print(f"stopped before {len(calls) - done} of {len(calls)} calls")
    for rows in _alike(table):
        print(*aligned(_error_table(rows)), "", sep="\n")
    print("Relative errors against fp64, of each column the one nearest to its bound.")
    print(*failures, f"{done} calls, {len(failures)} failures", sep="\n")
    return 1 if failures or done < len(calls) else 0


def _failures(case: Case, row: Errors) -> list[str]:
    """What is wrong with a call; its errors go to the row."""
    failures = []
    try:
        errors = case.errors()
    except Exception as problem:  # the other operators are still to be checked
        return [f"{case}: {type(problem).__name__}: {problem}"]
    for name, (error, bound) in errors.items():
        if error > bound:
            failures.append(f"{case}: {name} is off by {error:.1e}, expected {bound:.1e}")
        column = re.sub(r"initial_|\[\d\]", "", name)
        row[column] = max(row.get(column, (0.0, 1.0)), (error, bound), key=_share)
    return failures


def _share(error_and_bound: tuple[float, float]) -> float:
    return error_and_bound[0] / error_and_bound[1]


def _alike(table: dict[tuple[str, str, str], Errors]) -> Iterable[dict[tuple[str, ...], Errors]]:
    """The rows of operators that have the same columns."""
    columns: dict[str, set[str]] = {}
    for (name, *_), row in table.items():
        columns.setdefault(name, set()).update(row)
    groups: dict[frozenset[str], dict[tuple[str, ...], Errors]] = {}
    for labels, row in table.items():
        groups.setdefault(frozenset(columns[labels[0]]), {})[labels] = row
    return groups.values()


def _error_table(rows: dict[tuple[str, ...], Errors]) -> Iterator[list[str]]:
    """One line an operator, device and dtype; what is too large has a ``!``."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    columns.sort(key=lambda column: column.startswith("d"))  # gradients last
    yield ["operator", "device", "dtype", *columns]
    for labels, row in rows.items():
        yield [*labels, *(_cell(*row[column]) if column in row else "-" for column in columns)]


def _cell(error: float, bound: float) -> str:
    return f"{error:.0e}{'!' if error > bound else ''}"

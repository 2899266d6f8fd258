"""What tests on a GPU ask of every launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fla.testing.compare import measure, named_results
from fla.testing.spec import OpSpec, Shape

# Where a copy overtakes a product, one call of twenty was wrong beside other processes on the GPU.
AGAIN = 30


def moved(run: Callable[[], Sequence[Tensor]], times: int = 1000) -> int:
    """How many elements of the results are others than at first, in so many repetitions."""
    first = run()
    count = torch.zeros((), device=first[0].device, dtype=torch.int64)
    for _ in range(times):
        for a, b in zip(first, run(), strict=True):
            count += (a != b).sum()
    return int(count.item())


def check(spec: OpSpec, shape: Shape, variant: str, dtype: torch.dtype) -> None:
    """Output and every gradient are near enough to fp64."""
    found = measure(spec, shape, variant, dtype, "cuda")
    wrong = {name: pair for name, pair in found.items() if not pair[0] <= pair[1]}
    assert found and not wrong, wrong


def check_launch(spec: OpSpec, shape: Shape, variant: str, dtype: torch.dtype) -> None:
    """And they have the same bits again and again."""
    check(spec, shape, variant, dtype)

    def run() -> list[Tensor]:
        arguments = spec.arguments(shape, variant, dtype, "cuda", 0)  # some calls write to them
        return [*named_results(spec.outputs, arguments, spec.gradients).values()]

    assert not moved(run, AGAIN)

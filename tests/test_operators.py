"""What holds for every public operator: right, packed, split, causal, differentiable."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from shapes import PACKED, of, variants
from torch import Tensor

from fla.testing import Shape
from fla.testing.compare import FP64_BOUND, _bound, measure, named_results, relative_error
from fla.testing.spec import PER_HEAD, PER_SEQUENCE, one_sequence, spans

HALVES = (torch.float16, torch.bfloat16)


def every(*conditions, **more):
    found = variants(*conditions)
    ids = [f"{spec}-{variant}".replace(" ", "_") for spec, variant in found]
    return pytest.mark.parametrize("spec, variant", found, ids=ids, **more)


def check(spec, shape, variant, dtype):
    measured = measure(spec, shape, variant, dtype)
    wrong = {name: pair for name, pair in measured.items() if not pair[0] <= pair[1]}
    assert not wrong, f"{shape}: errors beyond their bounds: {wrong}"


@every()
def test_output_and_gradients_in_fp64(spec, variant):
    for shape in of(spec):
        check(spec, shape, variant, torch.float64)


@every()
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_output_and_gradients_in_lower_precision(spec, variant, dtype):
    group = 2 if spec.grouped else 1
    check(spec, Shape(T=70, H=8 // group, group=group, K=33, V=20), variant, dtype)
    if spec.packed:
        shape = Shape.packed(0, 5, 66, 0, H=8 // group, group=group)
        check(spec, shape, variant, dtype)


@every(lambda spec: spec.name != "fused_kda_gate")
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(spec, variant, scale):
    arguments = {**spec.arguments(Shape(T=70, V=16), variant), "scale": scale}
    found = named_results(spec.outputs, arguments, spec.gradients)
    expected = named_results(spec.expected, arguments, spec.gradients)
    for name in expected:
        assert relative_error(found[name], expected[name]) <= FP64_BOUND, name


@pytest.mark.parametrize("factor", [1.5, torch.nan])
def test_half_precision_does_not_excuse_itself(factor):
    """What is wrong in 16 bits alone is as wrong in the simulation that bounds the error."""
    spec, variant = variants()[0]

    def run(**arguments):
        o, state = spec.run(**arguments)
        return (o if o.dtype == torch.float64 else o * factor), state

    wrong = dataclasses.replace(spec, run=run)
    error, bound = measure(wrong, Shape(T=20), variant, torch.bfloat16)["o"]
    assert error > bound


def test_a_wrong_token_does_not_excuse_itself():
    """Of few parameters one may be off by chance."""
    usual = torch.full((24,), 1e-6, dtype=torch.float64)
    outlier = usual.clone()
    outlier[3] *= 50
    assert _bound(outlier, usual, few=False) == _bound(usual, usual, few=False)
    assert 1.2 < _bound(outlier, usual, few=True) / _bound(usual, usual, few=True) < 1.6
    assert _bound(usual, outlier, few=False) > _bound(usual, usual, few=False)


@every(lambda spec: spec.packed and spec.along_tokens)
def test_packed_equals_looped(spec, variant):
    for shape in PACKED:
        arguments = spec.arguments(shape, variant)
        o, *final = spec.outputs(arguments)
        bounds = arguments.pop("cu_seqlens")
        for n, (start, stop) in enumerate(spans(bounds)):
            o_n, *final_n = spec.outputs(one_sequence(arguments, n, start, stop))
            torch.testing.assert_close(o[:, start:stop], o_n)
            for each, each_n in zip(final, final_n, strict=True):
                torch.testing.assert_close(each[n : n + 1], each_n)


@every(lambda spec: spec.packed)
def test_what_is_not_finite_stays_in_its_sequence(spec, variant):
    """In the operands of some, or in the gradient of their outputs."""
    arguments = spec.arguments(Shape.packed(5, 20, 9, 7, 0), variant)
    spoilt = {5: [1, 3], 41: [*range(5, 25), *range(34, 41)]}  # of sequences, of tokens

    def fill(x, value):
        """A copy with ``value`` for the sequences 1 and 3 along dimension 0 or 1."""
        dim = 0 if len(x) == 5 else 1
        return x.index_fill(dim, torch.tensor(spoilt[x.shape[dim]]), value)

    def with_gradients_spoilt(arguments):
        return [x * fill(torch.ones_like(x), torch.nan) for x in spec.outputs(arguments)]

    broken = {
        name: fill(x, torch.nan)
        if isinstance(x, Tensor) and x.is_floating_point() and name not in PER_HEAD
        else x
        for name, x in arguments.items()
    }
    expected = named_results(spec.outputs, arguments, spec.gradients)
    for run, given in ((spec.outputs, broken), (with_gradients_spoilt, arguments)):
        found = named_results(run, given, spec.gradients)
        assert found["o"].isnan().any() or arguments.get("window_size") == 0
        for name, x in found.items():
            if name.removeprefix("d") not in PER_HEAD:
                torch.testing.assert_close(fill(x, 0), fill(expected[name], 0))


@every(lambda spec: spec.state)
def test_split_with_state_equals_whole(spec, variant):
    arguments = {**spec.arguments(Shape(T=150), variant), "output_final_state": True}
    o, *final = spec.outputs(arguments)
    first, second = cut(arguments, 0, 70), cut(arguments, 70, 150)
    if arguments.get("reverse"):
        first, second = second, first
    o_first, state = spec.run(**first)
    o_second, *end = spec.outputs({**second, "initial_state": state})
    parts = [o_second, o_first] if arguments.get("reverse") else [o_first, o_second]
    torch.testing.assert_close(torch.cat(parts, 1), o, rtol=1e-10, atol=1e-10)
    for whole, split in zip(final, end, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-10)


def cut(arguments, start, stop):
    T = arguments["q"].shape[1]
    return {
        name: value[:, start:stop]
        if isinstance(value, Tensor)
        and name not in PER_SEQUENCE
        and value.dim() > 1
        and value.shape[1] == T
        else value
        for name, value in arguments.items()
    }


@every(lambda spec: spec.along_tokens)
def test_a_later_token_never_changes_an_earlier_output(spec, variant):
    """Bit for bit, whatever value comes later; its gate forgets."""
    for dtype in (torch.float32, torch.bfloat16):
        arguments = spec.arguments(Shape(T=150), variant, dtype)
        if arguments.get("reverse"):
            return
        before, *_ = spec.outputs(arguments)
        for at, change in ((149, later), (100, later), (64, later), (17, later), (100, lost)):
            changed = {
                name: change(value, at) if name in {"q", "k", "v", "g", "beta"} else value
                for name, value in arguments.items()
            }
            after, *_ = spec.outputs(changed)
            assert torch.equal(after[:, :at], before[:, :at]), (dtype, at)


def later(value, at):
    value = value.clone()
    value[:, at:] = value[:, at:] * 50 - 3
    return value


def lost(value, at):
    value = value.clone()
    value[:, at:] = torch.nan
    return value


@every()
def test_inputs_of_any_strides_stay_as_they_are(spec, variant):
    shape = Shape(T=66, B=2)
    arguments = spec.arguments(shape, variant)
    expected = named_results(spec.outputs, arguments, spec.gradients)
    strided = {name: restride(value) for name, value in arguments.items()}
    copies = {n: v.clone() for n, v in strided.items() if isinstance(v, Tensor)}
    found = named_results(spec.outputs, strided, spec.gradients)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-12, name
    for name, copy in copies.items():
        assert torch.equal(strided[name], copy), f"{name} was modified"


def restride(value):
    """The same values, time or another dimension last in memory."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    return value.transpose(1, -1).contiguous().transpose(1, -1)


@every()
def test_a_stride_of_zero(spec, variant):
    arguments = spec.arguments(Shape(T=66, B=1), variant)
    dense, expanded = dict(arguments), dict(arguments)
    for name in ("q", "v", "g", "beta"):
        if isinstance(arguments.get(name), Tensor):
            expanded[name] = arguments[name][:, :1].expand_as(arguments[name])
            dense[name] = expanded[name].contiguous()
    for one, other in zip(spec.outputs(expanded), spec.outputs(dense), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@every(lambda spec: spec.along_tokens)
def test_dtypes(spec, variant):
    """Outputs follow q, states are fp32, gradients follow what they belong to."""
    for dtype in (torch.float32, *HALVES):
        arguments = spec.arguments(Shape(T=20), variant, dtype)
        if isinstance(arguments.get("g"), Tensor):
            arguments["g"] = arguments["g"].to(torch.bfloat16)
        results = named_results(spec.outputs, arguments, spec.gradients)
        for name, result in results.items():
            if name == "o":
                assert result.dtype == dtype
            elif name.startswith("final") and spec.state:
                assert result.dtype == torch.float32
            elif name.startswith("d") and isinstance(arguments.get(name[1:]), Tensor):
                assert result.dtype == arguments[name[1:]].dtype, name


@every(lambda spec: spec.state)
def test_the_state_is_returned_only_on_request(spec, variant):
    arguments = {**spec.arguments(Shape(T=5), variant), "output_final_state": False}
    assert spec.run(**arguments)[1] is None


@every()
def test_nothing_reads_memory_that_nobody_wrote(spec, variant):
    """Fresh buffers are filled with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for shape in of(spec)[4:]:
            arguments = spec.arguments(shape, variant, torch.float32)
            for name, value in named_results(spec.outputs, arguments, spec.gradients).items():
                assert value.isfinite().all(), (shape, name)
    finally:
        torch.use_deterministic_algorithms(False)


@every()
def test_repeats_bit_for_bit(spec, variant):
    arguments = spec.arguments(Shape(T=100), variant, torch.float32)
    first = named_results(spec.outputs, arguments, spec.gradients)
    second = named_results(spec.outputs, arguments, spec.gradients)
    assert all(torch.equal(first[name], second[name]) for name in first)

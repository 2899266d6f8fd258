"""Bad input gives one clear error: the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from inspect import signature
from unittest import mock

import numpy
import pytest
import torch
from shapes import variants

from fla import ops
from fla.ops.common.boundary import Operator
from fla.ops.linear_attn.utils import normalize_with_z_state
from fla.testing import Shape

BOUNDS = "cu_seqlens"


def every(*conditions):
    found = variants(*conditions)
    first = {spec.name: (spec, variant) for spec, variant in reversed(found)}
    return pytest.mark.parametrize("spec, variant", first.values(), ids=first.keys())


def refuses(spec, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        spec.run(**arguments)


@every(lambda spec: spec.along_tokens)
def test_shapes(spec, variant):
    good = spec.arguments(Shape(T=6), variant)
    v = good["v"]
    refuses(spec, {**good, "v": v[0]}, ValueError, "v: expected [")
    refuses(spec, {**good, "v": v[:, :5]}, ValueError, f"got {list(v[:, :5].shape)}")
    refuses(spec, {**good, "k": good["k"][..., :3]}, ValueError, "k: expected [")


@every(lambda spec: spec.along_tokens)
def test_types(spec, variant):
    good = spec.arguments(Shape(T=6), variant, torch.float32)
    refuses(spec, {**good, "q": None}, TypeError, "q: expected a tensor, got NoneType")
    refuses(spec, {**good, "k": [1.0]}, TypeError, "k: expected a tensor, got list")
    refuses(
        spec,
        {**good, "q": good["q"].long()},
        TypeError,
        "q: expected a floating point tensor, got torch.int64",
    )
    refuses(
        spec,
        {**good, "k": good["k"].half()},
        TypeError,
        "k: expected the dtype of q, torch.float32, got torch.float16",
    )
    refuses(
        spec,
        {**good, "v": good["v"].to("meta")},
        ValueError,
        "v: expected the device of q, cpu, got meta",
    )


@every(lambda spec: spec.along_tokens)
def test_floats_of_8_bits_are_not_taken(spec, variant):
    good = spec.arguments(Shape(T=6), variant, torch.float32)
    small = {name: good[name].to(torch.float8_e4m3fn) for name in "qkv"}
    message = "q: expected a floating point tensor, got torch.float8_e4m3fn; fp64, fp32, fp16"
    refuses(spec, {**good, **small}, TypeError, message)


@every(lambda spec: spec.along_tokens)
@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_layouts_that_are_not_taken(spec, variant):
    good = spec.arguments(Shape(T=6), variant, torch.float32)
    spec.run(**good)  # what passes once is not checked again
    message = "q: expected a dense tensor, got torch.sparse_coo; sequences of several lengths are"
    refuses(spec, {**good, "q": good["q"].to_sparse()}, TypeError, message)
    nested = torch.nested.nested_tensor([*good["q"]], layout=torch.jagged)
    refuses(spec, {**good, "q": nested}, TypeError, "q: expected a dense tensor, got torch.jagged")


@every(lambda spec: spec.along_tokens)
def test_heads_without_channels(spec, variant):
    good = spec.arguments(Shape(T=6), variant)
    none = {"q": good["q"][..., :0], "k": good["k"][..., :0]}
    if isinstance(good.get("g"), torch.Tensor) and good["g"].dim() == 4:
        none["g"] = good["g"][..., :0]
    refuses(spec, {**good, **none}, ValueError, "K: expected a head size from 1 up to ")


@every(lambda spec: spec.along_tokens and "lightning" not in spec.name)
def test_scales(spec, variant):
    good = spec.arguments(Shape(T=6), variant)
    for scale, kind in (("1", "str"), (torch.tensor(1.0), "Tensor"), (True, "bool")):
        refuses(spec, {**good, "scale": scale}, TypeError, f"scale: expected a number, got {kind}")
    for scale in (math.nan, -math.inf):
        message = f"scale: expected a finite number, got {scale}"
        refuses(spec, {**good, "scale": scale}, ValueError, message)


@pytest.mark.parametrize("kind", [int, numpy.float32])
@every(lambda spec: "lightning" not in spec.name)
def test_kernels_get_numbers_of_one_type(spec, variant, kind):
    """Triton would compile for each type anew, and for an int that is 1 as if it was always 1."""
    numbers = {"scale": kind(3), "lower_bound": kind(-4), "window_size": numpy.int64(5)}
    good = spec.arguments(Shape(T=6), variant)
    given = {name: x for name, x in numbers.items() if name in signature(spec.run).parameters}
    call, seen = Operator.__call__, []
    record = lambda self, *args: seen.extend([*args[:-1], *args[-1]]) or call(self, *args)  # noqa: E731
    with mock.patch.object(Operator, "__call__", record):
        spec.run(**{**good, **given})
    types = {type(x) for x in seen if not isinstance(x, torch.Tensor)}
    assert types <= {float, int, bool, type(None), torch.dtype}
    assert not any(type(x) is int and x in (3, -4) for x in seen)


@every(lambda spec: spec.along_tokens)
def test_unknown_keywords(spec, variant):
    good = spec.arguments(Shape(T=6), variant)
    refuses(spec, {**good, "banana": 1}, TypeError, "banana: ")
    refuses(
        spec,
        {**good, "head_first": True},
        TypeError,
        "no such argument: tensors are always [B, T, H, D]; pass x.transpose(1, 2)",
    )


@every(lambda spec: spec.state)
def test_flags(spec, variant):
    good = spec.arguments(Shape(T=6), variant)
    message = "output_final_state: expected True or False, got str"
    refuses(spec, {**good, "output_final_state": "yes"}, TypeError, message)


def test_flags_by_place():
    """What means True is True, whatever stands for it; anything else is refused."""
    q = torch.zeros(1, 6, 2, 4)
    for given in (True, 1, numpy.True_):
        assert ops.chunk_simple_gla(q, q, q, None, None, None, None, given)[1] is not None
        assert ops.chunk_simple_gla(q, q, q, output_final_state=given)[1] is not None
    for given in (False, 0, numpy.False_):
        assert ops.chunk_simple_gla(q, q, q, None, None, None, None, given)[1] is None
    for given in ("yes", None, numpy.ones(1), torch.ones(())):
        with pytest.raises(TypeError, match="output_final_state: expected True or False, got "):
            ops.chunk_simple_gla(q, q, q, None, None, None, None, given)


@every(lambda spec: spec.packed and spec.along_tokens)
def test_boundaries(spec, variant):
    good = spec.arguments(Shape.packed(2, 4), variant)
    for values, message in (
        ([1, 2, 6], "cu_seqlens: expected to start at 0, got 1"),
        ([0, 7, 6], "cu_seqlens: expected not to decrease, got 6 after 7"),
        ([0, 2, 7], "cu_seqlens: expected to end at T = 6, got 7"),
        ([0, 2, 5], "cu_seqlens: expected to end at T = 6, got 5"),
    ):
        refuses(spec, {**good, BOUNDS: torch.tensor(values)}, ValueError, message)
    refuses(
        spec,
        {**good, BOUNDS: torch.tensor([0.0, 6.0])},
        TypeError,
        "cu_seqlens: expected torch.int32 or torch.int64, got torch.float32",
    )
    refuses(spec, {**good, BOUNDS: [0, 6]}, TypeError, "cu_seqlens: expected a tensor, got list")
    refuses(
        spec,
        {**good, BOUNDS: torch.tensor([[0, 6]])},
        ValueError,
        "cu_seqlens: expected [N + 1], got [1, 2]",
    )
    dense = spec.arguments(Shape(T=6, B=2), variant)
    refuses(
        spec,
        {**dense, BOUNDS: torch.tensor([0, 2, 6])},
        ValueError,
        "q: expected a batch of 1 with cu_seqlens, got 2",
    )


@pytest.fixture
def qkv():
    return dict(zip("qkv", torch.randn(3, 2, 6, 2, 4), strict=True))


def test_gates_exclude_each_other(qkv):
    g = torch.zeros(2, 6, 2)
    with pytest.raises(ValueError, match="g_gamma: expected None beside g"):
        ops.chunk_simple_gla(**qkv, g=g, g_gamma=torch.zeros(2))
    with pytest.raises(
        ValueError, match=re.escape("g: expected [B, T, H] = [2, 6, 2], got [2, 6]")
    ):
        ops.chunk_simple_gla(**qkv, g=g[..., 0])


def test_chunk_size(qkv):
    for call in (ops.chunk_simple_gla, ops.chunk_lightning_attn):
        more = {"layer_idx": 0, "num_layers": 2} if "lightning" in call.__name__ else {}
        with pytest.raises(ValueError, match="chunk_size: expected one of 16, 32, 64, 128, got 48"):
            call(**qkv, **more, chunk_size=48)
        with pytest.raises(TypeError, match="chunk_size: expected a whole number, got float"):
            call(**qkv, **more, chunk_size=64.0)


def test_head_sizes(qkv):
    wide = torch.randn(1, 2, 1, 513)
    with pytest.raises(ValueError, match="K: expected a head size from 1 up to 512, got 513"):
        ops.chunk_simple_gla(wide, wide, wide[..., :4])
    with pytest.raises(ValueError, match="V: expected a head size from 1 up to 512, got 513"):
        ops.chunk_linear_attn(wide[..., :4], wide[..., :4], wide)


def test_states(qkv):
    state = torch.zeros(3, 2, 4, 4)
    expected = "initial_state: expected [N, H, K, V] = [2, 2, 4, 4], got [3, 2, 4, 4]"
    with pytest.raises(ValueError, match=re.escape(expected)):
        ops.chunk_simple_gla(**qkv, initial_state=state)
    with pytest.raises(TypeError, match="initial_state: expected a tensor without normalize"):
        ops.chunk_linear_attn(**qkv, initial_state=(state[:2], state), normalize=False)
    with pytest.raises(ValueError, match=re.escape("initial_state[1]: expected [N, 1, H, K]")):
        ops.chunk_linear_attn(**qkv, initial_state=(state[:2], state))


def test_state_layout_has_one_name(qkv):
    with pytest.raises(ValueError, match="transpose_state_layout: expected None"):
        ops.fused_recurrent_simple_gla(**qkv, state_v_first=True, transpose_state_layout=True)
    with pytest.raises(TypeError, match="transpose_state_layout: expected True or False, got str"):
        ops.fused_recurrent_simple_gla(**qkv, transpose_state_layout="no")
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        o, _ = ops.fused_recurrent_simple_gla(**qkv, transpose_state_layout=True)
    assert torch.equal(o, ops.fused_recurrent_simple_gla(**qkv, state_v_first=True)[0])


def test_the_map_is_not_offered_for_packed_sequences(qkv):
    with pytest.raises(ValueError, match="output_attentions: expected False with cu_seqlens"):
        packed = {name: x[:1] for name, x in qkv.items()}
        ops.parallel_simple_gla(**packed, output_attentions=True, cu_seqlens=torch.tensor([0, 6]))


def test_groups_of_no_heads():
    q, none = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 0, 8)
    with pytest.raises(ValueError, match="HQ: expected a multiple of H = 0, got 4 heads"):
        ops.parallel_attn(q, none, none)
    with pytest.raises(ValueError, match="HV: expected a multiple of H = 0, got 4 heads"):
        ops.chunk_kda(none, none, q, q, q[..., 0])
    assert ops.parallel_attn(none, q, q).shape == (1, 2, 0, 8)


def test_windows_and_bounds_are_numbers(qkv):
    with pytest.raises(TypeError, match="window_size: expected a whole number, got float"):
        ops.parallel_attn(**qkv, window_size=3.5)
    with pytest.raises(TypeError, match="lower_bound: expected a number, got str"):
        ops.fused_kda_gate(qkv["q"], lower_bound="low")
    gated = {"safe_gate": True, "use_gate_in_kernel": True, "lower_bound": "low"}
    with pytest.raises(TypeError, match="lower_bound: expected a number, got str"):
        ops.chunk_kda(**qkv, g=qkv["q"], beta=qkv["q"][..., 0], **gated)
    with pytest.raises(TypeError, match="layer_idx: expected a whole number, got NoneType"):
        ops.chunk_lightning_attn(**qkv, layer_idx=None, num_layers=4)


def test_a_state_beside_no_tensor(qkv):
    with pytest.raises(TypeError, match="q: expected a tensor, got list"):
        ops.chunk_kda([1.0], *[qkv["q"]] * 3, qkv["q"][..., 0], initial_state=qkv["q"])


def test_gates():
    for dtype in (torch.int32, None):
        with pytest.raises(TypeError, match="output_dtype: expected a floating point dtype, got"):
            ops.fused_kda_gate(torch.zeros(2, 4), lower_bound=-1.0, output_dtype=dtype)
    with pytest.raises(TypeError, match="g: expected a tensor, got NoneType"):
        ops.fused_kda_gate(None, lower_bound=-1.0)
    with pytest.raises(ValueError, match=re.escape("g: expected [HV, K], got [4]")):
        ops.fused_kda_gate(torch.zeros(4), lower_bound=-1.0)


BAD_NORMALIZERS = [
    ({"q": None}, TypeError, "q: expected a tensor, got NoneType"),
    ({"k": torch.zeros(2, 5, 2, 4)}, ValueError, "k: expected [B, T, H, K] = [2, 6, 2, 4], got"),
    ({"o": torch.zeros(2, 5, 2, 4)}, ValueError, "o: expected [B, T, H, V] = [2, 6, 2, 4], got"),
    ({"z_init": torch.zeros(2, 2, 4)}, ValueError, "z_init: expected [N, 1, H, K] = [2, 1, 2, 4]"),
]


@pytest.mark.parametrize(
    "changes, error, message", BAD_NORMALIZERS, ids=[x[2] for x in BAD_NORMALIZERS]
)
def test_normalizers(qkv, changes, error, message):
    more = {"scale": 1.0, "z_init": None, "reverse": False, "cu_seqlens": None}
    good = {"o": qkv["v"], "q": qkv["q"], "k": qkv["k"], **more}
    with pytest.raises(error, match=re.escape(message)):
        normalize_with_z_state(**{**good, **changes})


def test_layers(qkv):
    with pytest.raises(ValueError, match="layer_idx: expected 0 <= layer_idx <= num_layers = 4"):
        ops.chunk_lightning_attn(**qkv, layer_idx=5, num_layers=4)
    for none in (0, -4):
        with pytest.raises(ValueError, match=f"num_layers: expected at least 1, got {none}"):
            ops.chunk_lightning_attn(**qkv, layer_idx=0, num_layers=none)
    with pytest.raises(TypeError, match="num_layers: expected a whole number, got float"):
        ops.chunk_lightning_attn(**qkv, layer_idx=0, num_layers=4.0)


def test_host_copies(qkv):
    packed = {name: x[:1] for name, x in qkv.items()}
    bounds = torch.tensor([0, 2, 6])
    ops.chunk_simple_gla(**packed, cu_seqlens=bounds, cu_seqlens_cpu=bounds)
    with pytest.raises(ValueError, match="cu_seqlens_cpu: expected the values of cu_seqlens"):
        ops.chunk_simple_gla(**packed, cu_seqlens=bounds, cu_seqlens_cpu=torch.tensor([0, 3, 6]))
    with pytest.raises(ValueError, match="cu_seqlens_cpu: expected None without cu_seqlens"):
        ops.chunk_simple_gla(**packed, cu_seqlens_cpu=bounds)

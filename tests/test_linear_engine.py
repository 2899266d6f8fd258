"""What is particular to the linear engine: uncommon decays, the normaliser, textbooks."""

from __future__ import annotations

import pytest
import torch

from fla import ops
from fla.ops.linear_attn.naive import naive_chunk_linear_attn, naive_recurrent_linear_attn
from fla.ops.linear_attn.utils import normalize_output, normalize_with_z_state
from fla.ops.simple_gla.naive import (
    naive_chunk_simple_gla,
    naive_parallel_simple_gla,
    naive_recurrent_simple_gla,
)
from fla.testing.compare import relative_error


def draw(*size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def run(call, *inputs):
    """o and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = call(*leaves)[0]
    loss = (o * draw(*o.shape, dtype=o.dtype)).sum()
    given = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [o.detach(), *given]


def against_textbook(q, k, v, g, bound=1e-5):
    found = run(ops.chunk_simple_gla, q, k, v, g)
    expected = run(naive_recurrent_simple_gla, *(x.double() for x in (q, k, v, g)))
    for name, one, other in zip(("o", "dq", "dk", "dv", "dg"), found, expected, strict=True):
        assert one.isfinite().all(), name
        assert relative_error(one, other) < bound, name


@pytest.mark.parametrize("steep", [-1e4, -80.0, -5.0])
def test_near_weights_beside_a_steep_decay(steep):
    """A running sum would carry the steep step into every later difference."""
    T = 200
    q, k, v = (draw(1, T, 2, d) for d in (16, 16, 20))
    g = torch.full((1, T, 2), -1e-6)
    g[:, ::7] = -0.05
    g[:, 5::16] = steep
    against_textbook(q, k, v, g)


def test_a_decay_of_everything():
    """exp(−inf) is zero: documents may be cut apart by the gate."""
    q, k, v = (draw(1, 100, 2, 8) for _ in range(3))
    g = torch.full((1, 100, 2), -0.1)
    g[:, 40] = -torch.inf
    whole, _ = ops.chunk_simple_gla(q, k, v, g)
    g[:, 40] = -0.1
    tail, _ = ops.chunk_simple_gla(*(x[:, 40:] for x in (q, k, v, g)))
    assert relative_error(whole[:, 40:], tail) < 1e-6


def test_growth_beyond_the_range_of_an_exponential():
    """e^117 is not a number in fp32; nothing times it is zero, and little times it is not much."""
    q, k, v = (draw(1, 64, 1, 8) for _ in range(3))
    k[:, :5] = 0
    for x in (k, v):  # so that every gradient can be represented
        x[:, :31] *= 1e-18
    g = torch.full((1, 64, 1), -2.0)
    g[:, 5:31] = 4.5  # within one chunk, whatever its size
    against_textbook(q, k, v, g)


def test_growth_of_nothing():
    """Weights beyond the largest number, of values that are 0."""
    q, k, v = 3 * draw(1, 70, 1, 8), draw(1, 70, 1, 8), draw(1, 70, 1, 12)
    v[:, :62] = 0
    g = torch.full((1, 70, 1), -0.1)
    g[:, :62] = 3
    o, _ = ops.chunk_simple_gla(q, k, v, g)
    assert relative_error(o, naive_recurrent_simple_gla(q, k, v, g)[0]) < 1e-5


@pytest.mark.parametrize("growth, T", [(10.0, 20), (5.0, 60)])
def test_growth_that_only_fp64_holds(growth, T):
    """Far beyond the largest number in fp32, and in the map of weights too."""
    q, k, v = (draw(1, T, 1, d, dtype=torch.float64) for d in (8, 8, 12))
    g = torch.full((1, T, 1), growth, dtype=torch.float64)
    against_textbook(q, k, v, g, bound=1e-10)
    o, weights = ops.parallel_simple_gla(q, k, v, g, output_attentions=True)
    for one, other in zip((o, weights), naive_parallel_simple_gla(q, k, v, g), strict=True):
        assert relative_error(one, other) < 1e-10


def test_gradient_of_the_gate_over_a_long_sequence():
    q, k, v = (draw(1, 8192, 1, 16) for _ in range(3))
    g = torch.nn.functional.logsigmoid(draw(1, 8192, 1) + 6)
    found = run(ops.chunk_simple_gla, q, k, v, g)[-1]
    expected = run(ops.chunk_simple_gla, *(x.double() for x in (q, k, v, g)))[-1]
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("T", [16, 100])
@pytest.mark.parametrize("result", [0, 1], ids=["o", "final state"])
@pytest.mark.parametrize("steep", [-5.0, -20.0])
def test_gradient_of_gates_that_leave_little(steep, result, T):
    """It is as small as what they leave, beside what no gate is in: a token's pair with itself, and
    the last token's with the final state.  And it is as exact."""
    q, k, v = draw(3, 1, T, 2, 16)
    found, expected = (
        run(
            lambda *x: [call(*x, output_final_state=True)[result]],  # noqa: B023
            *inputs,
            torch.full((1, T, 2), steep, dtype=inputs[0].dtype),
        )[-1]
        for call, inputs in (
            (ops.chunk_simple_gla, (q, k, v)),
            (naive_recurrent_simple_gla, (q.double(), k.double(), v.double())),
        )
    )
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_chunk_size_changes_nothing():
    q, k, v = (draw(2, 150, 2, d, dtype=torch.float64) for d in (8, 8, 12))
    g = -draw(2, 150, 2, dtype=torch.float64).abs()
    expected = run(ops.chunk_simple_gla, q, k, v, g)
    for size in (16, 32, 64, 128):
        found = run(lambda *x: ops.chunk_simple_gla(*x, chunk_size=size), q, k, v, g)  # noqa: B023
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_textbooks_agree():
    q, k, v = (draw(2, 70, 2, d, dtype=torch.float64) for d in (8, 8, 12))
    state = draw(2, 8, 12, dtype=torch.float64)  # unbatched
    for g in (-draw(2, 70, 2, dtype=torch.float64).abs(), None):
        o, S = naive_recurrent_simple_gla(q, k, v, g, initial_state=state)
        o_chunk, S_chunk = naive_chunk_simple_gla(q, k, v, g, state, output_final_state=True)
        torch.testing.assert_close((o_chunk, S_chunk), (o, S))
        o, S = naive_recurrent_simple_gla(q, k, v, g, output_final_state=False)
        assert S is None
        torch.testing.assert_close(naive_parallel_simple_gla(q, k, v, g)[0], o)


def test_textbooks_agree_on_a_decay_of_everything():
    q, k, v = (draw(2, 70, 2, d, dtype=torch.float64) for d in (8, 8, 12))
    g = -draw(2, 70, 2, dtype=torch.float64).abs()
    g[:, ::9], g[:, -1] = -torch.inf, -torch.inf
    found = naive_chunk_simple_gla(q, k, v, g, output_final_state=True, chunk_size=16)
    torch.testing.assert_close(found, naive_recurrent_simple_gla(q, k, v, g))


def test_textbooks_of_linear_attention_agree():
    q, k, v = (draw(2, 128, 2, d, dtype=torch.float64).abs() for d in (8, 8, 12))
    for normalize in (False, True):
        o, _ = naive_recurrent_linear_attn(q, k, v, normalize=normalize)
        torch.testing.assert_close(naive_chunk_linear_attn(q, k, v, normalize=normalize), o)
    with pytest.raises(ValueError, match="multiple of 64, got 127"):
        naive_chunk_linear_attn(q[:, :127], k[:, :127], v[:, :127])


def test_a_missing_normaliser_is_zero():
    q, k, v = (draw(2, 9, 2, d, dtype=torch.float64).abs() for d in (8, 8, 12))
    kv = draw(2, 2, 8, 12, dtype=torch.float64)
    zeros = torch.zeros(2, 1, 2, 8, dtype=torch.float64)
    expected, _ = naive_recurrent_linear_attn(q, k, v, initial_state=(kv, zeros), normalize=True)
    for call in (naive_recurrent_linear_attn, ops.fused_recurrent_linear_attn):
        for state in (kv, (kv, None)):
            o, _ = call(q, k, v, initial_state=state, normalize=True)
            torch.testing.assert_close(o, expected)


def test_textbooks_compute_in_fp32():
    q, k, v = (draw(1, 40, 1, 8, dtype=torch.bfloat16) for _ in range(3))
    o, S = naive_recurrent_simple_gla(q, k, v, None)
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float32


def test_normalize_output():
    q, k, v = (draw(2, 70, 2, d, dtype=torch.float64).abs() for d in (8, 8, 12))
    plain, _ = ops.chunk_linear_attn(q, k, v, scale=1, normalize=False)
    expected = plain / ((q * k.cumsum(1)).sum(-1, keepdim=True) + 1e-10)
    torch.testing.assert_close(normalize_output(q, k, plain), expected)
    torch.testing.assert_close(ops.chunk_linear_attn(q, k, v, scale=1)[0], expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_normalize_with_z_state(reverse):
    bounds = torch.tensor([0, 30, 30, 70])
    q, k, v = (draw(1, 70, 2, d, dtype=torch.float64).abs() for d in (8, 8, 12))
    z = draw(3, 1, 2, 8, dtype=torch.float64).abs()
    kv = draw(3, 2, 8, 12, dtype=torch.float64)
    more = {"scale": 0.5, "reverse": reverse, "cu_seqlens": bounds, "output_final_state": True}
    plain, _ = ops.fused_recurrent_linear_attn(q, k, v, initial_state=kv, **more)
    expected, (_, z_expected) = ops.fused_recurrent_linear_attn(
        q, k, v, initial_state=(kv, z), normalize=True, **more
    )
    o, z_state = normalize_with_z_state(plain, q, k, 0.5, z, reverse, bounds)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(z_state, z_expected)
    torch.testing.assert_close(z_state[1], z[1])  # an empty sequence


def test_a_state_keeps_any_float_dtype():
    """Its gradient comes back in it."""
    q, k, v = (draw(1, 20, 2, 8) for _ in range(3))
    state = draw(1, 2, 8, 8, dtype=torch.bfloat16).requires_grad_()
    o, final = ops.chunk_simple_gla(q, k, v, initial_state=state, output_final_state=True)
    (o.sum() + final.sum()).backward()
    assert final.dtype == torch.float32 and state.grad.dtype == torch.bfloat16

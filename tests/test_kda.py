"""What is particular to the delta engine: uncommon decays, raw gates, states, serving."""

from __future__ import annotations

import functools
import itertools
import re
from unittest import mock

import pytest
import torch
from torch.nn.functional import normalize

from fla import ops
from fla.ops.common.dispatch import Problem
from fla.ops.kda import engine
from fla.ops.kda.gate import fused_kda_gate, naive_kda_gate, naive_kda_lowerbound_gate
from fla.ops.kda.naive import naive_chunk_kda, naive_recurrent_kda
from fla.testing.compare import relative_error

BOTH = pytest.mark.parametrize("call", [ops.chunk_kda, ops.fused_recurrent_kda])


def draw(*size):
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator)


def operands(T, B=1, H=2, HV=4, K=24, V=40):
    """q, k, v, g and beta; keys of norm one."""
    k = normalize(draw(B, T, H, K + 1)[..., 1:], dim=-1)
    g = -torch.exp(draw(B, T, HV, K) - 2)
    return draw(B, T, H, K), k, draw(B, T, HV, V), g, draw(B, T, HV).sigmoid()


def run(call, inputs):
    """o, the final state, and the gradients of all inputs through both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o, state = call(*leaves)
    loss = (o * draw(*o.shape)).sum() + (state * draw(*state.shape)).sum()
    return [o.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def agree(call, textbook, *inputs, bound=1e-5):
    """``call`` in fp32 against ``textbook`` in fp64 on the same values."""
    found = run(call, inputs)
    expected = run(textbook, [x.double() for x in inputs])
    for at, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.isfinite().all(), at
        assert relative_error(one, other) < bound, at


def with_state(call):
    return lambda *x: call(*x, output_final_state=True)


DECAYS = (-1e-6, -0.05, -5.0, -80.0, -1e4)


def mixed(size, seed):
    """Mostly gentle, and of everything else something in each block."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(4 * len(DECAYS), size, generator=generator)
    return torch.tensor([*DECAYS, *[-0.01] * 3 * len(DECAYS)])[which]


def see_saw(size, step):
    g = torch.full(size, step)
    g[:, ::2] *= -1
    return g


GATES = {
    **{f"all {g}": lambda size, g=g: torch.full(size, g) for g in DECAYS},
    "mixed": lambda size: mixed(size, 0),
    "mixed with −inf": lambda size: mixed(size, 1).masked_fill(mixed(size, 2) == -5, -torch.inf),
    "growing": lambda size: draw(*size).abs() / 2,
    "growing and forgetting": lambda size: see_saw(size, 40.0),
}


@BOTH
@pytest.mark.parametrize("gate", GATES)
def test_any_gate(call, gate):
    """Gradients too: those of a steep gate are zero, not the rest of two large numbers."""
    q, k, v, g, beta = operands(140)
    g = GATES[gate](g.shape)
    agree(with_state(call), with_state(naive_recurrent_kda), q, k, v, g, beta)


def test_a_steep_gate_has_no_gradient():
    q, k, v, g, beta = operands(130)
    g[:, 70] = -1e4
    leaf = g.requires_grad_()
    o, _ = ops.chunk_kda(q, k, v, leaf, beta)
    (dg,) = torch.autograd.grad(o.square().sum(), leaf)
    assert (dg[:, 70] == 0).all()
    assert (dg[:, 71] != 0).all()


def test_a_gate_that_forgets_everything_begins_a_sequence():
    x = operands(100)
    x[3][:, 40] = -torch.inf
    whole, state = ops.chunk_kda(*x, output_final_state=True)
    tail, expected = ops.chunk_kda(*(each[:, 40:] for each in x), output_final_state=True)
    assert relative_error(whole[:, 40:], tail) < 1e-6
    assert relative_error(state, expected) < 1e-6


@BOTH
@pytest.mark.parametrize("T", [7, 150])
def test_no_token_sees_a_later_one(call, T):
    """Bit for bit, even if the later one overflows."""
    x = operands(T)
    o, _ = call(*x)
    for t in (0, 3, 15, 16, 40, 63, 64, 100):
        for value in (3e38, -1e4, 1e4):
            if t + 1 < T:
                later = [each.clone() for each in x]
                for each in later:
                    each[:, t + 1 :] = value
                assert torch.equal(call(*later)[0][:, : t + 1], o[:, : t + 1]), (t, value)


@pytest.mark.parametrize("overflowing", ["k", "v"])
def test_what_overflows_is_seen_to(overflowing):
    """It is not silently finite, and neither is what follows in its sequence."""
    q, k, v, g, beta = operands(40)
    if overflowing == "k":
        k[:, 10] = 1e30
    else:
        v[:, 10] = 3e38
        beta[:, 10] = 2
    o, state = ops.chunk_kda(q, k, v, g, beta, output_final_state=True)
    assert o[:, :10].isfinite().all()
    assert not o[:, 10 if overflowing == "v" else 12 :].isfinite().any()
    assert not state.isfinite().all()


@BOTH
@pytest.mark.parametrize("T", [5, 40])
def test_an_empty_memory_stays_empty(call, T):
    """However much it grows."""
    q, k, v, g, beta = operands(T)
    o, state = call(q * 0, k * 0, v, g * 0 + 300, beta, output_final_state=True)
    assert (o == 0).all()
    assert (state == 0).all()


@BOTH
@pytest.mark.parametrize("T", [8, 9])
def test_a_memory_that_is_empty_while_it_grows(call, T):
    """A decay from a chunk's start beyond the largest number, of nothing."""
    x = normalize(torch.ones(1, T, 1, 2), dim=-1)
    g = torch.zeros(1, T, 1, 2)
    g[:, :2], g[:, 2] = 45, -45
    beta = torch.full((1, T, 1), 0.5)
    o, _ = call(x, x, x, g, beta)
    expected = naive_recurrent_kda(x, x, x, g, beta)[0]
    torch.testing.assert_close(o, expected)


RAW = {
    "softplus": {},
    "lower bound": {"lower_bound": -5.0},
    "lower bound, no rate": {"lower_bound": -2.0, "A_log": None},
    "softplus, no bias": {"dt_bias": None},
}


def activated(q, k, v, g, beta, A_log, dt_bias, lower_bound=None, double=False):
    """What the flags ask for, in the words of the contract."""
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if lower_bound is None:
        g = naive_kda_gate(g, A_log, dt_bias, g.dtype)
    else:
        g = naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound, g.dtype)
    return q, k, v, g, (2 if double else 1) * beta.sigmoid()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("raw", RAW)
def test_raw_operands(raw, double):
    """Gradients of A_log and dt_bias are sums over all tokens: padding must not add to them."""
    T, HV, K = 77, 4, 24
    q, k, v, _, _ = operands(T)
    g, beta = 3 * draw(1, T, HV, K), draw(1, T, HV)
    g[:, ::9] = 1e4  # with a large rate, log-decays of −1e5
    parameters = {"A_log": draw(HV, 1), "dt_bias": draw(HV * K)}
    settings = dict(RAW[raw])
    for name in settings.keys() & parameters.keys():
        parameters[name] = settings.pop(name)
    names = [name for name, value in parameters.items() if value is not None]
    given = [parameters[name] for name in names]

    def call(*x):
        return ops.chunk_kda(
            *x[:5],
            **dict(zip(names, x[5:], strict=True)),
            **settings,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=double,
            output_final_state=True,
        )

    def textbook(*x):
        both = {"A_log": None, "dt_bias": None, **dict(zip(names, x[5:], strict=True))}
        ready = activated(*x[:5], **both, **settings, double=double)
        return naive_recurrent_kda(*ready, output_final_state=True)

    agree(call, textbook, q, 3 * k, v, g, beta, *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_the_gate_alone_is_the_gate_in_the_kernel(lower_bound, dtype):
    q, k, v, g, beta = operands(50)
    raw, A_log, dt_bias = draw(*g.shape).to(dtype), draw(4), draw(4 * 24)
    g = fused_kda_gate(raw, A_log, dt_bias, lower_bound)
    assert g.dtype == torch.float32
    apart, _ = ops.chunk_kda(q, k, v, g, beta)
    settings = {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound}
    within, _ = ops.chunk_kda(q, k, v, raw, beta, use_gate_in_kernel=True, **settings)
    assert relative_error(within, apart) < 1e-6


@pytest.mark.parametrize("rated", [True, False])
@pytest.mark.parametrize("x", [-20.0, 9.0, 15.0])
def test_gradient_of_a_saturated_gate(x, rated):
    """As small as what is left to open or to close, and as exact."""
    inputs = [x + 0.1 * draw(1, 20, 2, 8), 0.1 * draw(2)][: 1 + rated]

    def gradients(gate, inputs):
        leaves = [each.requires_grad_() for each in inputs]
        return torch.autograd.grad(gate(*leaves).sum(), leaves)

    def textbook(g, A_log=None):
        return naive_kda_lowerbound_gate(g, A_log, None, -5.0, g.dtype)

    expected = gradients(textbook, [each.double() for each in inputs])
    found = gradients(functools.partial(fused_kda_gate, lower_bound=-5.0), inputs)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_a_rate_beyond_the_largest_number(lower_bound):
    """It forgets all, or nothing where the raw gate lets nothing through; gradients are numbers."""
    q, k, v, _, beta = operands(30)
    raw, A_log, dt_bias = draw(1, 30, 4, 24), torch.full((4,), 100.0), torch.zeros(96)
    leaves = [x.requires_grad_() for x in (q, k, v, raw, beta, A_log, dt_bias)]
    o, _ = ops.chunk_kda(
        q, k, v, raw, beta, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound,
        use_gate_in_kernel=True,
    )  # fmt: skip
    assert all(x.isfinite().all() for x in (o, *torch.autograd.grad(o.sum(), leaves)))


def test_a_large_gradient_of_a_gate_that_lets_nothing_through():
    raw = torch.full((1, 1, 1, 1), -110.0, requires_grad=True)
    fused_kda_gate(raw, torch.full((1,), 80.0)).mul(1e4).sum().backward()
    wide = raw.detach().double().requires_grad_()
    naive_kda_gate(wide, torch.full((1,), 80.0), None, wide.dtype).mul(1e4).sum().backward()
    assert relative_error(raw.grad, wide.grad) < 1e-5


def test_parameters_of_an_unused_gate_do_not_matter():
    x = operands(20)
    expected, _ = ops.chunk_kda(*x)
    found, _ = ops.chunk_kda(*x, A_log=draw(4), dt_bias=draw(96), lower_bound=-5.0)
    assert torch.equal(found, expected)


def test_promises_do_not_change_the_result():
    x = operands(70)
    expected, _ = ops.chunk_kda(*x)
    for settings in (
        {"safe_gate": True, "lower_bound": -5.0},
        {"disable_recompute": True},
        {"use_graph": True, "max_num_seqs": 8},
    ):
        assert torch.equal(ops.chunk_kda(*x, **settings)[0], expected)


@pytest.mark.parametrize("lengths", [None, (0, 40, 0, 70, 1, 0)])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("chunk_size", [32, 64])
def test_intermediate_states(chunk_size, state_v_first, lengths):
    """Each is the final state of the tokens before it."""
    T = sum(lengths or (111,))
    x = [each.bfloat16() for each in operands(T)]
    bounds = torch.tensor([0, *(lengths or (T,))]).cumsum(0)
    with torch.inference_mode():
        _, _, h = ops.chunk_kda(
            *x,
            cu_seqlens=None if lengths is None else bounds,
            chunk_size=chunk_size,
            state_v_first=state_v_first,
            return_intermediate_states=True,
        )
    expected = []
    for start, stop in itertools.pairwise(bounds):
        for end in range(start, stop, chunk_size):
            before = (each[:, start:end] for each in x)
            _, state = ops.chunk_kda(*before, output_final_state=True, state_v_first=state_v_first)
            expected.append(state)
    assert h.dtype == torch.bfloat16
    assert relative_error(h, torch.stack(expected, 1)) < 4e-3


@pytest.mark.parametrize("lengths", [None, (0, 40, 0, 70, 1, 0)])
def test_intermediate_states_compile(lengths):
    x = operands(sum(lengths or (111,)))
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)

    def run(*x):
        more = {"output_final_state": True, "return_intermediate_states": True}
        return ops.chunk_kda(*x, cu_seqlens=bounds, **more)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        found, expected = compiled(*x), run(*x)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(ValueError, match=r"outside of torch\.inference_mode"):
            compiled(*x)


def test_kernels_leave_states_before_chunks_of_32_to_pytorch_and_say_so():
    able = dict.fromkeys(("lacks_triton", "lacks_hopper"), lambda *_: None)
    with mock.patch.multiple(engine, **able):
        for chunk_size, taken in ((64, True), (32, False)):
            options = engine.Options(chunk_size=chunk_size, intermediate_states=True)
            problem = Problem(torch.device("cuda"), torch.bfloat16, 128, 128, options)
            reasons = dict(engine.ENGINE.explain(problem))
            assert (reasons["triton"] is None) == (reasons["hopper"] is None) == taken, reasons
        for stages, reason in (
            (engine.ENGINE, "kernels keep states before chunks of 64, not of 32"),
            (engine.CHANNELWISE_BACKWARD, "a beta for each channel has no chunks"),
        ):
            stages._warned.clear()
            with pytest.warns(UserWarning, match=f"runs in plain PyTorch: {reason}"):
                stages.choose(problem)
    x = operands(8)
    with pytest.raises(TypeError, match="chunk_size: expected a whole number, got float"):
        ops.chunk_kda(*x, chunk_size=64.0)


def test_textbooks_agree():
    x = [each.double() for each in operands(64)]
    state = draw(4, 24, 40).double()  # one for all of the batch
    settings = {"scale": 0.3, "initial_state": state, "output_final_state": True}
    expected, expected_state = naive_recurrent_kda(*x, **settings)
    found, found_state = naive_chunk_kda(*x, **settings, chunk_size=16)
    assert relative_error(found, expected) < 1e-12
    assert relative_error(found_state, expected_state) < 1e-12
    with pytest.raises(ValueError, match="q: expected T to be a multiple of 64, got T = 50"):
        naive_chunk_kda(*(each[:, :50] for each in x))


def test_textbooks_agree_on_a_decay_of_everything():
    q, k, v, g, beta = (each.double() for each in operands(64))
    g = g.clone()
    g[:, ::9], g[:, 30:, :, ::3], g[:, -1, 0] = -torch.inf, -torch.inf, -torch.inf
    settings = {"initial_state": draw(4, 24, 40).double(), "output_final_state": True}
    found = naive_chunk_kda(q, k, v, g, beta, **settings, chunk_size=16)
    for one, other in zip(found, naive_recurrent_kda(q, k, v, g, beta, **settings), strict=True):
        assert one.isfinite().all()
        assert relative_error(one, other) < 1e-12


def raw(**settings):
    return {"use_gate_in_kernel": True, **settings}


BAD_CHUNK = [
    ({"chunk_size": 16}, "chunk_size: `chunk_size` must be either 32 or 64, got 16"),
    ({"allow_neg_eigval": True}, "allow_neg_eigval: expected False without use_beta_sigmoid"),
    (raw(), "A_log: expected a tensor where no lower_bound is given, got None"),
    (raw(A_log=torch.ones(3)), "A_log: expected [HV] = [4], got [3]"),
    (raw(A_log=torch.ones(2, 3)), "A_log: expected [HV] = [4], got [2, 3]"),
    (raw(A_log=torch.ones(4), dt_bias=torch.ones(4)), "dt_bias: expected [HV*K] = [96], got [4]"),
    (raw(safe_gate=True, lower_bound=-6.0), "lower_bound: expected [-5, 0) with safe_gate"),
    (raw(safe_gate=True, lower_bound=0.0), "lower_bound: expected [-5, 0) with safe_gate"),
    (raw(safe_gate=True, A_log=torch.ones(4)), "lower_bound: expected [-5, 0) with safe_gate"),
    ({"cp_context": object()}, "cp_context: expected None"),
    ({"return_intermediate_states": True}, "outside of torch.inference_mode()"),
    (
        {"state_v_first": True, "transpose_state_layout": True},
        "transpose_state_layout: expected None beside state_v_first",
    ),
    (
        {"initial_state": torch.zeros(1, 4, 40, 24)},
        "initial_state: expected [N, HV, K, V] = [1, 4, 24, 40], got [1, 4, 40, 24]",
    ),
    ({"beta": torch.zeros(1, 6, 4, 40)}, "beta: expected [B, T, HV] = [1, 6, 4]"),
    ({"g": torch.zeros(1, 6, 2, 24)}, "g: expected [B, T, HV, K] = [1, 6, 4, 24]"),
    ({"v": torch.zeros(1, 6, 3, 40)}, "expected [B, T, HV, K]"),
]


def refuses(call, changes, message, error=ValueError):
    names = ("q", "k", "v", "g", "beta")
    arguments = dict(zip(names, operands(6), strict=True)) | changes
    with pytest.raises(error, match=re.escape(message)):
        call(**arguments)


@pytest.mark.parametrize("changes, message", BAD_CHUNK, ids=[message for _, message in BAD_CHUNK])
def test_bad_input(changes, message):
    refuses(ops.chunk_kda, changes, message)


def test_bad_heads_and_head_sizes():
    v, g, beta = torch.zeros(1, 6, 3, 40), torch.zeros(1, 6, 3, 24), torch.zeros(1, 6, 3)
    message = "HV: expected a multiple of H = 2, got 3 heads"
    refuses(ops.chunk_kda, {"v": v, "g": g, "beta": beta}, message)
    v = torch.zeros(1, 6, 4, 513)
    refuses(ops.chunk_kda, {"v": v}, "V: expected a head size from 1 up to 512, got 513")


def test_the_chunked_form_wants_its_state_in_fp32():
    state = {"initial_state": torch.zeros(1, 4, 24, 40, dtype=torch.bfloat16)}
    message = "initial_state: expected torch.float32, got torch.bfloat16"
    refuses(ops.chunk_kda, state, message, TypeError)
    ops.fused_recurrent_kda(*operands(6), **state)
    wide = [x.double() for x in operands(6)]
    ops.chunk_kda(*wide, initial_state=state["initial_state"].double())
    ops.chunk_kda(*wide, initial_state=state["initial_state"].float())


def test_intermediate_states_are_not_kept_twice():
    with torch.inference_mode():
        both = {"return_intermediate_states": True, "disable_recompute": True}
        refuses(ops.chunk_kda, both, "disable_recompute: expected False")


def test_the_old_name_of_the_layout():
    x = operands(6)
    expected = ops.chunk_kda(*x, output_final_state=True, state_v_first=True)
    for call in (ops.chunk_kda, ops.fused_recurrent_kda):
        with pytest.warns(DeprecationWarning, match="state_v_first"):
            found = call(*x, output_final_state=True, transpose_state_layout=True)
        assert relative_error(found[1], expected[1]) < 1e-6

"""Break the code in one place at a time and show that the suite notices.

    python tests/mutants.py [NAME ...]

Each mutant is applied to a copy of the package; a mutant that survives is a hole in the suite and
makes the exit status 1.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
GENERIC = ("test_operators.py",)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """``before`` becomes ``after`` in ``file``; one of ``tests`` must fail."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...] = GENERIC


SEQUENCES = "fla/ops/common/sequences.py"
HOPPER_KEYS = "fla/ops/attn/hopper_keys.py"
HOPPER_STEPS = "fla/ops/attn/hopper_steps.py"
BACKWARD_TESTS = ("test_attn_hopper_backward.py",)
LINEAR = "fla/ops/simple_gla/eager.py"
SOFTMAX = "fla/ops/attn/eager.py"
SOFTMAX_BLOCKS = "fla/ops/attn/eager_blocks.py"
DELTA = "fla/ops/kda/eager.py"
DELTA_PAIRS = "fla/ops/kda/eager_pairs.py"
KDA_TESTS = ("test_kda.py", "test_operators.py")
ATTN_TESTS = ("test_attn.py", "test_attn_gates.py", "test_operators.py")
MODULE_TESTS = ("test_modules.py",)
LAYER_TESTS = ("test_layer_calls.py",)

MUTANTS = [
    Mutant("scale dropped", LINEAR, "beta=scale, alpha=scale", "beta=1.0, alpha=1.0"),
    Mutant(
        "gate shifted by a token",
        LINEAR,
        "self.chunks.take(g, 0, slots, self.dtype)",
        "self.chunks.take(g, 0, slots, self.dtype).roll(1, -1)",
    ),
    Mutant(
        "final state's gradient ignored",
        LINEAR,
        "walk.pack_state(dstate, dz), backward=True",
        "walk.pack_state(None, None), backward=True",
    ),
    Mutant(
        "state layouts swapped on the way out",
        LINEAR,
        "state = state.mT if self.options.state_v_first else state",
        "state = state if self.options.state_v_first else state.mT",
    ),
    Mutant(
        "empty sequence's state lost",
        SEQUENCES,
        "self._kept = self._states.clone()",
        "self._kept = self._states * 0",
    ),
    Mutant(
        "normaliser's z left out of a split",
        LINEAR,
        "packed[..., self.V] = z.squeeze(1)",
        "packed[..., self.V] = 0",
    ),
    Mutant("a query does not see its own key", LINEAR, "x.tril_()", "x.tril_(-1)"),
    Mutant(
        "state crosses into the next sequence",
        SEQUENCES,
        "torch.where(self._opens[slot], states, self._state)",
        "self._state",
    ),
    Mutant(
        "gate's gradient without the state that passes",
        LINEAR,
        "+ leaving + passing[..., None]",
        "+ leaving",
    ),
    Mutant(
        "gate's gradient with what its token leaves behind",
        LINEAR,
        "torch.nn.functional.pad(leaving[:, :-1], (1, 0)).cumsum(-1)",
        "leaving.cumsum(-1)",
    ),
    Mutant(
        "time not reversed when packed",
        SEQUENCES,
        "if self.reverse else start[:, None] + offset",
        "if False else start[:, None] + offset",
    ),
    Mutant(
        "growth applied at once",
        LINEAR,
        "self.halves = 2 if grows else 1",
        "self.halves = 1",
        ("test_linear_engine.py",),
    ),
    Mutant(
        "running sums differenced",
        LINEAR,
        "return (g[..., None] * later).cumsum_(-2)",
        "return (g.cumsum(-1)[..., None] - g.cumsum(-1)[..., None, :]) * later",
        ("test_linear_engine.py",),
    ),
    Mutant(
        "sink left out of the lse",
        SOFTMAX,
        "lse = torch.logaddexp(lse, sink)",
        "lse = lse + 0 * sink",
        ATTN_TESTS,
    ),
    Mutant(
        "window wider by one",
        SOFTMAX_BLOCKS,
        "low = self.rows - (window - 1)",
        "low = self.rows - window",
        ATTN_TESTS,
    ),
    Mutant(
        "gate's gradient shifted by a token",
        SOFTMAX,
        "dgate[block.lanes, :, block.first + 1 : block.stop] += sums.cumsum(-1)[..., :-1]",
        "dgate[block.lanes, :, block.first : block.stop] += sums.cumsum(-1)",
        ATTN_TESTS,
    ),
    Mutant(
        "tokens' pairs with themselves in the gate's gradient",
        SOFTMAX,
        "own.zero_()",
        "pass",
        ("test_attn_gates.py",),
    ),
    Mutant(
        "kernels that decode take scales to be positive",
        "fla/ops/attn/split_decoding.py",
        "q, scale = rising(q, options.scale)",
        "scale = options.scale",
        ("test_attn_triton.py",),
    ),
    Mutant(
        "blocks skipped as if no gate could grow",
        SOFTMAX_BLOCKS,
        "bound += self.rise[:, :, :at] + self.reach",
        "bound += self.reach",
        ATTN_TESTS,
    ),
    Mutant(
        "what is lost in a sequence lost in others",
        SOFTMAX,
        "return cu_seqlens is not None and on_host(cu_seqlens) and not finite(*results)",
        "return False",
    ),
    Mutant(
        "what a block without keys has read added",
        "fla/ops/attn/eager_decoding.py",
        "masked_fill_(~self.there.any(1)[:, None, None, None], 0)",
        "contiguous()",
    ),
    Mutant(
        "a value that is not finite seen beyond its window",
        SOFTMAX,
        "seen[:, window:] -= seen[:, :-window].clone()",
        "pass",
        ATTN_TESTS,
    ),
    Mutant(
        "a later value that is not finite seen",
        LINEAR,
        "b_v, beyond = apart(b_v)",
        "beyond = None",
    ),
    Mutant(
        "scale on the gate forgotten in decoding",
        "fla/ops/attn/engine.py",
        "scale if do_gate_scale else 1.0)",
        "1.0)",
        ATTN_TESTS,
    ),
    Mutant(
        "keys decay to a boundary one block too early",
        DELTA_PAIRS,
        "rest += after[..., -1:, :]",
        "rest += 0",
        KDA_TESTS,
    ),
    Mutant(
        "queries decay from a boundary one block too late",
        DELTA_PAIRS,
        "after += before[..., -1:, :]",
        "after += 0",
        KDA_TESTS,
    ),
    Mutant(
        "beta's gradient through the doubling lost",
        DELTA,
        "dbeta = dbeta * 2 if walk.options.neg_eigval else dbeta",
        "dbeta = dbeta * 1",
        KDA_TESTS,
    ),
    Mutant(
        "grouped heads' gradients not summed",
        DELTA,
        "each.unflatten(2, (walk.H, -1)).sum(3)",
        "each.unflatten(2, (walk.H, -1))[:, :, :, 0]",
        KDA_TESTS,
    ),
    Mutant(
        "l2norm's gradient without its projection",
        DELTA,
        "(y * dy).sum(-1, keepdim=True), value=-1)",
        "(y * dy).sum(-1, keepdim=True), value=0)",
        KDA_TESTS,
    ),
    Mutant(
        "A_log's gradient over the last run only",
        DELTA,
        "self.A_log += drate.sum((0, 1, 3, 4))",
        "self.A_log = drate.sum((0, 1, 3, 4)).double()",
        KDA_TESTS,
    ),
    Mutant(
        "an overflow seen by earlier tokens",
        DELTA_PAIRS,
        "x, overflowed = apart(x)",
        "overflowed = None",
        KDA_TESTS,
    ),
    Mutant(
        "rejected speculative token's state taken",
        DELTA,
        "accepted.long() - 1",
        "accepted.long() * 0 + indices.shape[1] - 1",
        ("test_kda_pool.py",),
    ),
    Mutant(
        "convolution's first tap a token late",
        "fla/modules/conv/eager.py",
        "y = joined[:, 1 : 1 + T] * taps[0]",
        "y = joined[:, :T] * taps[0]",
        MODULE_TESTS,
    ),
    Mutant(
        "residual not added",
        "fla/modules/norm/eager.py",
        "h = h + residual",
        "h = h + 0 * residual",
        MODULE_TESTS,
    ),
    Mutant(
        "convolution's history lost in decoding",
        "fla/layers/memory.py",
        'past = call.state.get("conv_state", (None, None, None))',
        "past = (None, None, None)",
        LAYER_TESTS,
    ),
    Mutant(
        "positions start anew in decoding",
        "fla/layers/attn.py",
        "q, k, call.past_tokens(), call.cu_seqlens",
        "q, k, 0, call.cu_seqlens",
        LAYER_TESTS,
    ),
    Mutant(
        "positions count padding",
        "fla/layers/mixer.py",
        "return self.seen if mask is None else",
        "return self.seen if True else",
        LAYER_TESTS,
    ),
    Mutant(
        "padding seen as tokens",
        "fla/layers/tokens.py",
        "if not mask.all():",
        "if False:",
        LAYER_TESTS,
    ),
    Mutant(
        "cache not reordered",
        "fla/layers/cache.py",
        "x.index_select(0, beam_idx.to(x.device))",
        "x.index_select(0, beam_idx.sort().values.to(x.device))",
        ("test_cache.py",),
    ),
    Mutant(
        "a check takes another dtype for the one that passed",
        "fla/ops/common/once.py",
        "(x.shape, x.dtype, x.device, x.layout)",
        "(x.shape, x.device, x.layout)",
        ("test_once.py",),
    ),
    Mutant(
        "a part of dq copied before it is fenced",
        HOPPER_KEYS,
        "FLAT, assert_trivial=True))\n    fence_async_shared()",
        "FLAT, assert_trivial=True))",
        BACKWARD_TESTS,
    ),
    Mutant(
        "turns passed on before dq is there",
        HOPPER_STEPS,
        "        wait_until_written()\n",
        "",
        BACKWARD_TESTS,
    ),
    Mutant(
        "a state not handed on to the share that goes on",
        "fla/ops/simple_gla/hopper_walk.py",
        "mask=(opens == 0) & (o_x < X), other=0.0)\n        within",
        "mask=(opens != 0) & (o_x < X), other=0.0)\n        within",
        ("test_linear_hopper.py",),
    ),
    Mutant(
        "compiled layers go on from a cache twice",
        "fla/layers/mixer.py",
        "return _first_time(x).clone()",
        "return x.clone()",
        ("test_layer_calls.py",),
    ),
    Mutant(
        "results of no_grad are views",
        "fla/ops/common/boundary.py",
        "return results if torch.is_inference_mode_enabled() else _own(results)",
        "return results",
        ("test_torch.py",),
    ),
    Mutant(
        "of a map that joins segments the last piece alone",
        "fla/ops/kda/chunk_inter.py",
        "b_next = tl.where(part == 0, b_a, b_next)",
        "b_next = tl.where(part == 0, b_a, 0.0)",
        ("test_kda_triton.py",),
    ),
]


def killed(mutant: Mutant) -> bool:
    """Whether the suite fails on a copy of the package with the mutant in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("fla", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        target = copy / mutant.file
        source = target.read_text()
        if source.count(mutant.before) != 1:
            raise SystemExit(f"{mutant.name}: its place in {mutant.file} is not there exactly once")
        target.write_text(source.replace(mutant.before, mutant.after))
        tests = [f"tests/{name}" for name in mutant.tests]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", *tests]
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if result.returncode not in (0, 1):
            raise SystemExit(f"{mutant.name}: the suite did not run\n{result.stdout[-2000:]}")
        return result.returncode == 1


def main(names: list[str]) -> int:
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise SystemExit(f"expected names of mutants, got {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    survivors = 0
    for mutant in chosen:
        start = time.perf_counter()
        dead = killed(mutant)
        survivors += not dead
        seconds = time.perf_counter() - start
        print(f"{'killed' if dead else 'SURVIVED':9} {mutant.name:50} {seconds:5.1f} s", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

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
LINEAR = "fla/ops/simple_gla/eager.py"

MUTANTS = [
    Mutant("scale dropped", LINEAR, "@ b_v) * options.scale", "@ b_v)"),
    Mutant(
        "gate shifted by a token",
        LINEAR,
        "return self.chunks.take(self.g, start, stop, self.dtype)",
        "return self.chunks.take(self.g, start, stop, self.dtype).roll(1, -1)",
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
    Mutant("a query does not see its own key", LINEAR, ").tril_()", ").tril_(-1)"),
    Mutant(
        "state crosses into the next sequence",
        SEQUENCES,
        "torch.where(self._opens[slot], states, self._state)",
        "self._state",
    ),
    Mutant(
        "gate's gradient without the state that passes",
        LINEAR,
        ".flip(-1) + passing[..., None]",
        ".flip(-1)",
    ),
    Mutant(
        "time not reversed when packed",
        SEQUENCES,
        "if self.reverse else start[:, None] + offset",
        "if False else start[:, None] + offset",
    ),
    Mutant("growth applied at once", LINEAR, "(exponent * 0.5).clamp_", "(exponent * 1).clamp_"),
    Mutant(
        "running sums differenced",
        LINEAR,
        "return g[..., None].expand(*g.shape, C).tril(-1).cumsum(-2)",
        "return (g.cumsum(-1)[..., None] - g.cumsum(-1)[..., None, :]).tril(-1)",
        ("test_linear_engine.py",),
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
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if result.returncode not in (0, 1):
            raise SystemExit(f"{mutant.name}: the suite did not run\n{result.stdout[-2000:]}")
        return result.returncode == 1


def main(names: list[str]) -> int:
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

"""How fast the operators are: ``python -m benchmarks cpu`` and ``python -m benchmarks gpu``."""

from pathlib import Path

# Where findings are written unless told; those that the documents quote lie in benchmarks/results
OUT = Path("measured")

"""How fast the operators are: ``python -m benchmarks cpu`` and ``python -m benchmarks gpu``."""

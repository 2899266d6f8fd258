"""Linear attention operators: fast on a GPU, useful on a CPU, right to the last gradient."""

__version__ = "1.0.0"

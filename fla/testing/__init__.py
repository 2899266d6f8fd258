"""What every public function is tested, checked and timed by: one ``OpSpec`` each.

``all_specs()`` lists them; the test suite, ``fla check`` and the benchmarks walk that list.
"""

from fla.testing.spec import OpSpec, Shape, all_specs

__all__ = ["OpSpec", "Shape", "all_specs"]

"""What every public function is tested and checked by: one ``OpSpec`` each.

``all_specs()`` lists them; the test suite and ``fla check`` walk that list.
"""

from fla.testing.spec import OpSpec, Shape, all_specs

__all__ = ["OpSpec", "Shape", "all_specs"]

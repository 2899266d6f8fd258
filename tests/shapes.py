"""The shapes on which generic tests run every operator, and how calls by name find theirs."""

from fla.testing import OpSpec, Shape, all_specs

DENSE = [
    Shape(T=0),
    Shape(T=1),
    Shape(T=15),
    Shape(T=63),
    Shape(T=64),
    Shape(T=65),
    Shape(T=1, B=3, H=1, K=1, V=1),
    Shape(T=500, B=1, H=3, K=33, V=20),
]
PACKED = [
    Shape.packed(0, 5, 0, 0, 64, 70, 1, 0),
    Shape.packed(1, 1, 1, K=20, V=12),
    Shape.packed(0, 0),
    Shape.packed(200, 3, 17),
]


def of(spec: OpSpec) -> list[Shape]:
    """The shapes that an operator takes."""
    shapes = DENSE + PACKED * spec.packed
    if spec.grouped:
        shapes += [Shape(T=65, H=2, group=3), Shape(T=1, H=1, group=4)]
        shapes += [Shape.packed(0, 40, 30, group=2)] * spec.packed
    return shapes


def variants(*conditions) -> list[tuple[OpSpec, str]]:
    """Every (operator, variant) whose operator meets all conditions."""
    from fla.testing import all_specs

    return [
        (spec, variant)
        for spec in all_specs()
        if all(condition(spec) for condition in conditions)
        for variant in spec.variants
    ]


def spec_named(name: str) -> OpSpec:
    return next(spec for spec in all_specs() if spec.name == name)


def shape_of(lengths: tuple[int, ...], **sizes: int) -> Shape:
    """Dense, of one length, or several sequences packed."""
    return Shape.packed(*lengths, **sizes) if len(lengths) > 1 else Shape(T=lengths[0], **sizes)

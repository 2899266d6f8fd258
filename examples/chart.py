"""Line charts as SVG that stands in a page: colours come from the page's style sheet.

    chart("time, ms", Axis("tokens", [512, 1024], log=True), Axis("", [1, 10], log=True), lines)

Every line is named at its end, in its colour, ``var(--name)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 46, 118, 16, 44
LABEL = 16  # least distance of names from each other

Point = tuple[float, float]


def plain(value: float) -> str:
    return f"{value:,g}"


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis ends where its first and its last tick are, or what lies beyond them."""

    title: str
    ticks: Sequence[float]
    log: bool = False
    text: Callable[[float], str] = plain


@dataclasses.dataclass(frozen=True)
class Line:
    name: str
    colour: str
    points: Sequence[Point]
    strong: bool = False
    dashed: bool = False
    dots: bool = True


def chart(
    title: str, x: Axis, y: Axis, lines: Sequence[Line], mark: tuple[float, str] | None = None
) -> str:
    """A figure; ``mark`` is a place on the x axis and its name, and lines may be empty."""
    lines = [line for line in lines if line.points]
    across = _scale(x, [point[0] for line in lines for point in line.points], LEFT, WIDTH - RIGHT)
    up = _scale(y, [point[1] for line in lines for point in line.points], HEIGHT - BOTTOM, TOP)
    parts = [*_grid(x, y, across, up)]
    if mark:
        at, name = across(mark[0]), escape(mark[1])
        parts.append(f'<line class="mark" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="mark" x="{at + 5}" y="{HEIGHT - BOTTOM - 8}">{name}</text>')
    for line in sorted(lines, key=lambda line: line.strong):
        parts += _line(line, x, y, across, up)
    parts += _names(lines, across, up)
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _scale(
    axis: Axis, values: Sequence[float], start: float, end: float
) -> Callable[[float], float]:
    """From values to places, to a tenth of a unit."""
    low, high = min([*axis.ticks, *values]), max([*axis.ticks, *values])
    turn = math.log if axis.log else float

    def place(value: float) -> float:
        part = (turn(value) - turn(low)) / ((turn(high) - turn(low)) or 1)
        return round(start + part * (end - start), 1)

    return place


def _grid(x: Axis, y: Axis, across: Callable, up: Callable) -> list[str]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y.ticks:
        at = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4}" text-anchor="end">')
        parts.append(f"{escape(y.text(tick))}</text>")
    for tick in x.ticks:
        at = across(tick)
        parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{floor + 18}" text-anchor="middle">')
        parts.append(f"{escape(x.text(tick))}</text>")
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    parts.append(f'<text class="tick" x="{(LEFT + right) / 2}" y="{floor + 37}"')
    parts.append(f' text-anchor="middle">{escape(x.title)}</text>')
    return parts


def _line(line: Line, x: Axis, y: Axis, across: Callable, up: Callable) -> list[str]:
    path = " ".join(f"{across(a)},{up(b)}" for a, b in line.points)
    kinds = " strong" * line.strong + " dashed" * line.dashed
    colour = f"var(--{line.colour})"
    parts = [f'<polyline class="line{kinds}" style="stroke:{colour}" points="{path}"/>']
    for a, b in line.points if line.dots else ():
        told = f"{line.name}, {x.text(a)} {x.title}: {y.text(b)}"
        parts.append(f'<circle cx="{across(a)}" cy="{up(b)}" r="{4 if line.strong else 3}"')
        parts.append(f' style="fill:{colour}"><title>{escape(told)}</title></circle>')
    return parts


def _names(lines: Sequence[Line], across: Callable, up: Callable) -> list[str]:
    """The lines' names at their ends, moved apart where they would touch."""
    ends = [(across(line.points[-1][0]), up(line.points[-1][1])) for line in lines]
    parts = []
    for line, (x, y), place in zip(lines, ends, apart([y for _, y in ends]), strict=True):
        at, colour = WIDTH - RIGHT + 14, f"var(--{line.colour})"
        parts.append(f'<polyline class="leader" style="stroke:{colour}"')
        parts.append(f' points="{x + 5},{y} {at - 3},{place}"/>')
        kind = "name strong" if line.strong else "name"
        parts.append(f'<text class="{kind}" x="{at}" y="{place + 4}" style="fill:{colour}">')
        parts.append(f"{escape(line.name)}</text>")
    return parts


def apart(places: Sequence[float]) -> list[float]:
    """The places moved as little as keeps them ``LABEL`` apart and above the axis."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[list[float]] = []  # of places that touch: their middle and how many they are
    for i in order:
        groups.append([places[i], 1])
        while len(groups) > 1 and _touch(*groups[-2:]):
            (a, m), (b, n) = groups.pop(-2), groups.pop()
            groups.append([(a * m + b * n) / (m + n), m + n])
    moved = [
        middle + LABEL * (k - (count - 1) / 2)
        for middle, count in groups
        for k in range(int(count))
    ]
    result = [0.0] * len(places)
    for i, place in zip(order, moved, strict=True):
        result[i] = round(place, 1)
    return result


def _touch(above: list[float], below: list[float]) -> bool:
    return below[0] - above[0] < LABEL * (above[1] + below[1]) / 2

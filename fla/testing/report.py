"""What long runs print: progress on stderr, aligned tables of text."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
_BAR = 30


def track(items: Sequence[Item], label: Callable[[Item], str]) -> Iterator[Item]:
    """The items one by one; a bar on a terminal, elsewhere a line for each new label."""
    terminal, shown = sys.stderr.isatty(), None
    for done, item in enumerate(items):
        text = label(item)
        if terminal:
            bar = "█" * (_BAR * done // len(items))
            line = f"{bar:░<{_BAR}} {done}/{len(items)} {text}"
            redraw(line)
        elif text != shown:
            print(f"{done + 1}/{len(items)} {text}", file=sys.stderr, flush=True)
        shown = text
        yield item
    if terminal:
        redraw("")


def redraw(line: str) -> None:
    """In place of what the terminal's line held; one that wraps could not be drawn over."""
    room = shutil.get_terminal_size().columns - 1
    print(f"\r{line[:room]}\x1b[K", end="", file=sys.stderr, flush=True)


def aligned(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines in which the columns of all rows stand under each other."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()

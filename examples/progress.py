"""How far a long run is, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time

from fla.testing.report import redraw

BAR = 24
REDRAW, LINE = 0.1, 10.0  # seconds between two drawings on a terminal, and elsewhere


class Progress:
    """``update(done, text)`` after each step; ``close()`` at the end, or use it in ``with``."""

    def __init__(self, label: str, total: int, start: int = 0):
        self._label, self._total, self._start = label, total, start
        self._terminal = sys.stderr.isatty()
        self._began = self._drawn = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, done: int, text: str = "") -> None:
        now = time.monotonic()
        if now - self._drawn < (REDRAW if self._terminal else LINE) and done < self._total:
            return
        self._drawn = now
        left = (now - self._began) / max(done - self._start, 1) * (self._total - done)
        line = f"{done}/{self._total}  {text}  {clock(left)} left"
        if self._terminal:
            bar = "█" * (BAR * done // self._total)
            redraw(f"{self._label} {bar:░<{BAR}} {line}")
        else:
            print(f"{self._label} {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._terminal:
            redraw("")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

"""Time and memory against length, softmax beside linear attention, on this machine's CPU.

python -m examples.length picture.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cpu import Case, measure_apart
from fla.testing.report import track

LENGTHS = [512, 1024, 2048, 4096, 8192]
OPERATORS = {
    "scaled_dot_product_attention": ("softmax", "#c2410c"),
    "chunk_simple_gla": ("linear", "#1d4ed8"),
}


def main(path: str) -> None:
    cases = [Case(operator, T, backward=True) for operator in OPERATORS for T in LENGTHS]
    found = {case: measure_apart(case, repeat_for=0.5) for case in track(cases, str)}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axes, quantity, unit, title in (
        (panels[0], "seconds", 1e-3, "time, ms"),
        (panels[1], "bytes", 1e6, "peak memory beyond the inputs, MB"),
    ):
        for operator, (label, colour) in OPERATORS.items():
            values = [found[Case(operator, T, backward=True)][quantity] / unit for T in LENGTHS]
            axes.loglog(LENGTHS, values, "o-", color=colour, linewidth=2, markersize=5)
            axes.annotate(
                f"{label}: {values[-1]:,.0f}",
                (LENGTHS[-1], values[-1]),
                xytext=(10, 0),
                textcoords="offset points",
                color=colour,
                va="center",
            )
        _style(axes, title)
    figure.suptitle(
        "Softmax attention (scaled_dot_product_attention) and linear attention (chunk_simple_gla)\n"
        f"forward and backward, 8 heads of 64, fp32, {torch.get_num_threads()} CPU threads",
        fontsize=11,
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")
    for case, result in found.items():
        print(f"{case}: {result['seconds'] * 1e3:.0f} ms, {result['bytes'] / 1e6:.0f} MB")


def _style(axes: plt.Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_locator(FixedLocator(LENGTHS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda T, _: f"{T:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(which="major", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(LENGTHS[0] / 1.2, LENGTHS[-1] * 3)


if __name__ == "__main__":
    main(*sys.argv[1:])

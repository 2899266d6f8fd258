"""One page of HTML with the demo's results: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from html import escape

from examples.chart import Axis, Line, chart
from examples.cost import Measured, cell
from examples.data import marked
from examples.model import MIXERS
from examples.recall import CHUNK, DISTANCES, Task, bins

PLAIN_NAMES = {
    "kda": "Kimi Delta Attention: decays channel by channel, and corrects what it holds",
    "lightning": "lightning attention: decays at a rate fixed by head and layer",
    "simple_gla": "simple gated linear attention: decays by a gate of each head",
    "linear": "linear attention: adds, and never forgets",
    "fox": "forgetting attention: softmax attention whose scores fade by a gate",
    "attn": "softmax attention with rotary positions",
}


@dataclasses.dataclass(frozen=True)
class Training:
    losses: Sequence[float]
    held_out: Sequence[tuple[int, float]]
    bigram: float
    parameters: int
    bytes_a_step: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run of the demo found."""

    machine: dict[str, str]
    seconds: float
    training: Training
    sample: str
    given: int  # items that the sample begins with
    right: float  # share of questions
    difference: tuple[float, float]  # between two forms' logits, and the largest logit
    decoding: Sequence[float]  # seconds of each byte
    task: Task
    recall: dict[str, list[float]]
    lengths: Sequence[int]
    costs: dict[str, list[Measured]]


def page(results: Results) -> str:
    parts = [
        *_header(results),
        *_model(results),
        *_recall(results),
        *_cost(results),
        *_footer(),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>fla: what it does on this machine</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(parts)}\n</main>\n</body>\n</html>\n"
    )


def _header(results: Results) -> list[str]:
    machine = " · ".join(escape(value) for value in results.machine.values())
    return [
        "<header>",
        "<h1>Attention in linear time, on this machine</h1>",
        f"<p class=lead>A small language model trained here from nothing, what six ways of mixing "
        f"tokens can remember, and what they cost. All of it took {_minutes(results.seconds)}.</p>",
        f"<p class=machine>{machine}</p>",
        "</header>",
    ]


def _model(results: Results) -> list[str]:
    training, (difference, largest) = results.training, results.difference
    first, last = start_and_end(results.decoding)
    speed = training.bytes_a_step * len(training.losses) / training.seconds
    held_out = training.held_out[-1][1]
    tiles = [
        (
            f"{held_out:.2f}",
            f"nats per byte on ledgers held out; a bigram needs {training.bigram:.2f}",
        ),
        (f"{100 * results.right:.0f}%", "of the questions in them answered right; guessing: 10%"),
        (
            f"{difference:.0e}",
            f"largest difference of logits, chunked and recurrent; they reach {largest:.0f}",
        ),
        (
            f"{first * 1e3:.2f} → {last * 1e3:.2f} ms",
            f"for a byte: the first hundred and the last of {len(results.decoding):,}",
        ),
    ]
    return [
        "<section>",
        "<h2>A language model that carries a state</h2>",
        f"<p>Two blocks of Kimi Delta Attention and a gated MLP, {training.parameters:,} "
        f"parameters, learn the built-in language byte by byte. Its documents are ledgers: "
        f"<code>k=7</code> notes that k is 7 from here on, <code>k?7</code> asks and answers, and "
        f"the note may be hundreds of bytes back. {len(training.losses)} steps of "
        f"{training.bytes_a_step:,} bytes took {_minutes(training.seconds)}, {speed:,.0f} bytes a "
        f"second. Training sees chunks; writing goes a byte at a time, from a state that does not "
        f"grow.</p>",
        _tiles(tiles),
        "<div class=pair>",
        _loss_chart(training),
        _decoding_chart(results.decoding),
        "</div>",
        "<h3>What it writes</h3>",
        *_sample(results),
        "</section>",
    ]


def _sample(results: Results) -> list[str]:
    """The text with its answers marked."""
    items = list(marked(results.sample))
    kinds = ["given"] * results.given + [verdict for _, verdict in items[results.given :]]
    words = [
        f'<span class="{kind}">{escape(item)}</span>' if kind else escape(item)
        for (item, _), kind in zip(items, kinds, strict=True)
    ]
    asked = sum(map(bool, kinds[results.given :]))
    counts = [
        f"{kinds.count(kind)} <span class={kind}>{text}</span>"
        for kind, text in (("right", "right"), ("wrong", "wrong"), ("unknown", "never noted"))
    ]
    return [
        f"<p>It goes on from <span class=given>a part of a ledger</span> that it has not seen, and "
        f"then asks itself {asked} questions: {counts[0]}, {counts[1]}, and {counts[2]}, about "
        f"letters that have no answer.</p>",
        f"<pre>{' '.join(words)}</pre>",
    ]


def _loss_chart(training: Training) -> str:
    steps = len(training.losses)
    top = max(training.bigram * 1.5, training.held_out[0][1])
    lines = [
        Line(
            "bigram", "quiet", [(0, training.bigram), (steps, training.bigram)], False, True, False
        ),
        Line("training", "soft", _smooth(training.losses, top), dots=False),
        Line("held out", "kda", training.held_out, strong=True),
    ]
    x = Axis("steps", _round_ticks(steps))
    y = Axis("nats per byte", [tick / 2 for tick in range(int(top * 2) + 1)])
    return chart("Loss, nats per byte", x, y, lines)


def _smooth(losses: Sequence[float], top: float) -> list[tuple[float, float]]:
    """Means over a few steps, from where they come into the picture."""
    few = max(len(losses) // 100, 1)
    means = [
        (start + few / 2, statistics.mean(losses[start : start + few]))
        for start in range(0, len(losses), few)
    ]
    return [(step, loss) for step, loss in means if loss <= top]


def _decoding_chart(seconds: Sequence[float]) -> str:
    few = max(len(seconds) // 20, 1)
    points = [
        (start + few / 2, statistics.median(seconds[start : start + few]) * 1e3)
        for start in range(0, len(seconds), few)
    ]
    top = max(ms for _, ms in points)
    step = next(size for size in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 1e9) if top <= 5 * size)
    y = Axis("ms", [round(step * i, 1) for i in range(6)])
    x = Axis("bytes written", _round_ticks(len(seconds)))
    return chart("Time for one more byte, ms", x, y, [Line("kda", "kda", points, strong=True)])


def start_and_end(seconds: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and of the last hundred."""
    return statistics.median(seconds[:100]), statistics.median(seconds[-100:])


def _recall(results: Results) -> list[str]:
    task = results.task
    ends = [*DISTANCES[1:], task.length]
    middles = [(start + end - 1) / 2 for start, end in zip(DISTANCES, ends, strict=True)]
    x = Axis("positions since the value was written", range(0, task.length + 1, CHUNK))
    y = Axis("", [0, 0.2, 0.4, 0.6, 0.8, 1], text=lambda share: f"{100 * share:.0f}%")
    known = {
        mixer: [(at, share) for at, share in zip(middles, shares, strict=True) if share == share]
        for mixer, shares in results.recall.items()
    }
    lines = [Line(mixer, mixer, points, mixer == "kda") for mixer, points in known.items()]
    head = ["", *bins(task)]
    rows = [
        [mixer, *("–" if share != share else f"{100 * share:.0f}" for share in shares)]
        for mixer, shares in results.recall.items()
    ]
    names = "".join(
        f'<dt style="color:var(--{mixer})">{mixer}</dt><dd>{escape(PLAIN_NAMES[mixer])}</dd>'
        for mixer in MIXERS
    )
    return [
        "<section>",
        "<h2>What a memory holds</h2>",
        f"<p>A stream of {task.length} positions gives {task.variables} variables new values again "
        f"and again, and asks for the latest. One block of each kind was trained alike, for "
        f"{task.steps} steps. A memory that only adds holds all values of a variable at once; one "
        f"that decays loses the old and the rarely written alike; the delta rule takes the old "
        f"value out as it puts the new one in. The memories compute in chunks of at most {CHUNK}: "
        f"what lies further back has gone through the state. The longest distances are those of "
        f"variables that were written least, and a sum confuses those least. Guessing gives "
        f"{100 / task.values:.0f}%.</p>",
        "<div class=wide>",
        chart("Right answers against distance", x, y, lines, mark=(CHUNK, "a chunk")),
        f"<dl>{names}</dl>",
        "</div>",
        _table("Right answers, % at each distance", head, rows),
        "</section>",
    ]


def _cost(results: Results) -> list[str]:
    lengths = results.lengths
    x = Axis("tokens", lengths, log=True)
    figures = []
    for title, quantity, unit in (
        ("Time, ms", "seconds", 1e-3),
        ("Peak memory beyond the inputs, MB", "bytes", 1e6),
    ):
        lines = [
            Line(
                name,
                name,
                [
                    (T, max(m[quantity] / unit, 0.1))
                    for T, m in zip(lengths, found, strict=True)
                    if m[quantity] == m[quantity]  # not of a process that was killed
                ],
                name == "kda",
            )
            for name, found in results.costs.items()
        ]
        values = [value for line in lines for _, value in line.points]
        figures.append(chart(title, x, Axis(title, _log_ticks(values), log=True), lines))
    rows = [[name, *map(cell, found)] for name, found in results.costs.items()]
    return [
        "<section>",
        "<h2>What length costs</h2>",
        "<p>Each operator forward and backward, 8 heads of 64, fp32, batch 1. Softmax attention is "
        "PyTorch's own <code>scaled_dot_product_attention</code>. Twice the length is twice the "
        "time of a recurrent memory, and four times that of softmax attention; fox is softmax "
        "attention too.</p>",
        "<div class=pair>",
        *figures,
        "</div>",
        _table("Time and memory", ["", *(f"{T:,} tokens" for T in lengths)], rows),
        "</section>",
    ]


def _footer() -> list[str]:
    return [
        "<footer><p>Made by <code>make demo</code>. Each part runs by itself: "
        "<code>python -m examples.train</code>, <code>examples.generate</code>, "
        "<code>examples.recall</code>, <code>examples.cost</code>. Thorough measurements come from "
        "<code>make bench</code>, and <code>fla check</code> checks every operator on this "
        "machine.</p></footer>"
    ]


def _tiles(tiles: Sequence[tuple[str, str]]) -> str:
    inner = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(text)}</span></div>"
        for value, text in tiles
    )
    return f"<div class=tiles>{inner}</div>"


def _table(summary: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return (
        f"<details><summary>{escape(summary)}</summary><div class=scroll><table>"
        f"<tr>{titles}</tr>{body}</table></div></details>"
    )


def _round_ticks(most: int) -> list[int]:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, most) if most <= 6 * s)
    return list(range(0, most + 1, step))


def _log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 5, 10, … from just below the least value to just above the largest."""
    ticks = [digit * 10.0**power for power in range(-1, 7) for digit in (1, 2, 5)]
    if max(values) / min(values) > 100:
        ticks = ticks[::3]
    first = max([i for i, tick in enumerate(ticks) if tick <= min(values)], default=0)
    last = min([i for i, tick in enumerate(ticks) if tick >= max(values)], default=len(ticks) - 1)
    return ticks[first : last + 1]


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfb; --card: #ffffff; --ink: #1c1e21; --quiet: #6b7078; --soft: #a9c0f5;
  --rule: #e4e5e8; --axis: #b9bcc3; --marked: #fff3bf;
  --kda: #1d4fd7; --lightning: #0b8a8f; --simple_gla: #2f9e44; --linear: #a8720a;
  --fox: #b0379f; --attn: #d9480f; --softmax: #d9480f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1c1f23; --ink: #e8e9eb; --quiet: #9aa0a8; --soft: #44598c;
    --rule: #2c3036; --axis: #565c65; --marked: #4d4318;
    --kda: #82a7ff; --lightning: #4fd1d6; --simple_gla: #74d680; --linear: #e5b454;
    --fox: #ee8fdf; --attn: #ff9466; --softmax: #ff9466;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 32px; }
h1 { font-size: 2.2rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 12px; }
h2 { font-size: 1.4rem; letter-spacing: -0.01em; margin: 0 0 8px; }
h3 { font-size: 1rem; margin: 28px 0 8px; }
p { max-width: 70ch; margin: 0 0 16px; }
.lead { font-size: 1.15rem; }
.machine, footer { color: var(--quiet); font-size: 0.875rem; }
section { margin-top: 56px; padding-top: 28px; border-top: 1px solid var(--rule); }
footer { margin-top: 56px; padding-top: 20px; border-top: 1px solid var(--rule); }
.tiles { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
.tile, figure, pre {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
}
.tile { padding: 16px 20px; }
.tile b {
  display: block; font-size: 1.45rem; line-height: 1.3; white-space: nowrap;
  letter-spacing: -0.01em; font-variant-numeric: tabular-nums;
}
.tile span { color: var(--quiet); font-size: 0.9rem; line-height: 1.4; display: block; }
.pair { display: grid; gap: 16px; margin-top: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.wide { display: grid; gap: 16px 32px; align-items: center;
  grid-template-columns: minmax(0, 3fr) minmax(220px, 2fr); }
@media (max-width: 760px) { .wide { grid-template-columns: 1fr; } }
figure { margin: 0; padding: 16px 12px 8px 16px; }
figcaption { font-weight: 600; font-size: 0.95rem; margin-bottom: 6px; }
svg { display: block; width: 100%; height: auto; font-size: 13px; overflow: visible; }
svg text { fill: var(--ink); font-variant-numeric: tabular-nums; }
svg text.tick, svg text.mark { fill: var(--quiet); }
svg text.name.strong { font-weight: 700; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--axis); }
svg line.mark { stroke: var(--axis); stroke-dasharray: 2 4; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .line.strong { stroke-width: 3.5; }
svg .line.dashed { stroke-dasharray: 6 5; }
svg .leader { fill: none; opacity: 0.45; }
svg circle { stroke: var(--card); stroke-width: 1.5; }
pre {
  margin: 0; padding: 16px 20px; overflow-x: auto; white-space: pre-wrap;
  font: 14px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: normal;
}
.given { background: var(--marked); border-radius: 3px; }
.right { color: var(--simple_gla); } .unknown { color: var(--quiet); font-style: italic; }
.wrong { color: var(--attn); text-decoration: underline; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.92em; }
dl { margin: 0; font-size: 0.92rem; line-height: 1.45; }
dt { font-weight: 600; } dd { margin: 0 0 10px; color: var(--quiet); }
details { margin-top: 16px; font-size: 0.9rem; }
summary { cursor: pointer; color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-top: 8px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid var(--rule); }
th { color: var(--quiet); font-weight: 500; white-space: nowrap; } td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
"""

"""What the documents say: their code runs, and they name what there is."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fla.ops

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The columns of an engine's table in the README, and of that in benchmarks/NOTES.md
QUOTED = {
    "kda": ("ours", "triton", "fla-core"),
    "linear": ("ours", "triton", "fla-core"),
    "softmax": ("ours", "fla-core", "cudnn"),
}
NOTED = QUOTED | {"softmax": ("ours", "triton", "fla-core", "cudnn", "flash", "flex")}
# What stands beside what there, of the results on a CPU
BESIDE = (
    ("chunk_kda forward, T 2048", "transformers chunk forward, T 2048"),
    ("chunk_kda forward and backward, T 2048", "transformers chunk forward and backward, T 2048"),
    ("chunk_simple_gla forward, T 4096", "scaled_dot_product_attention forward, T 4096"),
    ("parallel_forgetting_attn forward, T 4096", "scaled_dot_product_attention forward, T 4096"),
    (
        "parallel_forgetting_attn forward and backward, T 4096",
        "scaled_dot_product_attention forward and backward, T 4096",
    ),
)
DOCUMENTS = ["README.md", "DESIGN.md", "CONTRIBUTING.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_run(name):
    """The blocks of a document one after another, as a reader would run them."""
    text = (ROOT / name).read_text()
    scope: dict = {}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], name, "exec"), scope)


def test_the_readme_names_every_operator():
    readme = (ROOT / "README.md").read_text()
    assert [name for name in fla.ops.__all__ if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name):
    """Paths in back quotes or links that have a folder and an ending."""
    text = (ROOT / name).read_text()
    named = re.findall(r"`((?:fla|tests|benchmarks|examples)/[\w/]+\.\w+)`", text)
    named += re.findall(r"\]\(([^):]+)\)", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


def measured(columns: dict[str, tuple[str, ...]]) -> Iterator[tuple[dict, str]]:
    """Each row of the results on a GPU, and its cells of these columns."""
    for engine, libraries in columns.items():
        for row in json.loads((RESULTS / f"{engine}_gpu.json").read_text())["rows"]:
            yield row, " | ".join(milliseconds(row.get(name, {})) for name in libraries)


def quoted() -> list[str]:
    """The lines of the README's tables of measurements, as the results have them."""
    rows = [(row, cells) for row, cells in measured(QUOTED) if row["first"][0] is not None]
    lines = [f"| {row['name']} | {cells} |" for row, cells in rows]
    seconds = {
        case["case"].removesuffix(", float32"): case["seconds"]
        for row in json.loads((RESULTS / "cpu.json").read_text())["rows"]
        for case in row["measured"]
        if "float32" in case["case"]
    }
    for ours, other in BESIDE:
        cells = [short(1e3 * seconds[case]) for case in (ours, other)]
        lines.append(f"| {ours} | {cells[0]} | {cells[1]}, {other.split(' forward')[0]} |")
    return lines


def milliseconds(found: dict) -> str:
    found = [short(found[way]) for way in ("forward", "backward") if way in found]
    return " / ".join(found) or "–"


def short(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def test_the_readme_quotes_the_results():
    readme = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in quoted() if line not in readme] == []


def test_the_notes_have_all_results():
    """What is counted stands between a row's name and what was measured."""
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text().splitlines()
    for row, cells in measured(NOTED):
        starts = [line for line in notes if line.startswith(f"| {row['name']} |")]
        assert [line for line in starts if line.endswith(f"| {cells} |")], (row["name"], cells)

"""What the documents say: their code runs, and they name what there is."""

import re
from pathlib import Path

import pytest

import fla.ops

ROOT = Path(__file__).parent.parent
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

"""The benchmark measures what it says; how fast anything is, is not tested here."""

import json
import time

import pytest
import torch

from benchmarks import cpu
from benchmarks.cpu import Case, Row

MEGABYTES = 2**20
KNOWN = {"seconds": 1.0, "bytes": 2e9, "calls": 3, "others": 0.0}


@pytest.fixture
def known(monkeypatch):
    """An operator of which time and memory are known: 20 ms, and 64 MB beside its result."""

    def run(v):
        time.sleep(0.02)
        if len(v) > 64:
            torch.ones(64 * MEGABYTES // 4).sum()
        return v

    monkeypatch.setitem(cpu.OPERATORS, "known", (run, lambda T, dtype: {"v": torch.ones(T)}))


def test_time_and_memory(known):
    found = cpu.measure(Case("known", 65), repeat_for=0.1)
    assert 0.02 <= found["seconds"] < 1.0
    assert 60 * MEGABYTES < found["bytes"] < 90 * MEGABYTES
    assert found["calls"] >= 3


def test_a_process_of_its_own():
    found = cpu.measure_apart(Case("chunk_simple_gla", 128, backward=True), repeat_for=0.0)
    assert found["seconds"] > 0
    assert found["calls"] == 3


def test_rows():
    slow, fast = Case("slow", 1), Case("fast", 1)
    measured = {slow: {"seconds": 3.0}, fast: {"seconds": 2.0}}
    assert Row("", "seconds", 3, slow).value(measured) == 3
    assert Row("", "seconds", 1, slow, fast).value(measured) == 1.5


def test_the_least_disturbed_counts(monkeypatch):
    tries = iter([{"seconds": 9.0, "others": 0.9}, {"seconds": 1.0, "others": 0.0}])
    monkeypatch.setattr(cpu, "_measure_apart", lambda case, repeat_for: next(tries))
    assert cpu.measure_apart(Case("any", 1))["seconds"] == 1


def test_results_hold_what_is_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu, "RESULTS", tmp_path / "results" / "cpu.json")
    monkeypatch.setattr(cpu, "measure_apart", lambda case: dict(KNOWN))
    assert cpu.main([]) == 1  # 2 GB are too much
    printed = capsys.readouterr().out
    written = json.loads(cpu.RESULTS.read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert len(written["rows"]) == len(list(cpu.rows()))
    for row in written["rows"]:
        assert row["name"] in printed
    reached = [row["value"] <= row["at_most"] for row in written["rows"]]
    assert [row["reached"] for row in written["rows"]] == reached
    assert printed.count("MISSED") == sum(not row["reached"] for row in written["rows"]) > 0


def test_every_row_names_operators_that_exist():
    for row in cpu.rows():
        for case in row.cases:
            assert case.operator in cpu.OPERATORS or case.operator == cpu.IMPORT


def test_the_peer_is_not_this_package():
    for name in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"):
        peer = cpu._transformers(name)
        assert peer.__module__.startswith("transformers.")
        assert not hasattr(peer, "__wrapped__")

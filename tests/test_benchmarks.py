"""The benchmark measures what it says; how fast anything is, is not tested here."""

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import accumulate

import pytest
import torch
import triton.testing
from triton.backends.nvidia.driver import CudaDriver

from benchmarks import counters, cpu, gpu, kda_gpu, linear_gpu, softmax_gpu, suite
from benchmarks.cpu import Case, Row
from fla.ops.attn import attn_decoding_one_step, parallel_attn
from fla.ops.common import dispatch
from fla.testing.report import track

MEGABYTES = 2**20
KNOWN = {"seconds": 1.0, "bytes": 2e9, "calls": 3, "others": 0.0}


# An operator of which time and memory are known: 20 ms, and 64 MB beside its result.  It has a
# process of its own, for another's may hold enough free memory already.
MEASURE = """
import json, time, torch
from benchmarks import cpu

def run(v):
    time.sleep(0.02)
    if len(v) > 64:
        torch.ones(2**24).sum()
    return v

cpu.OPERATORS["known"] = run, lambda T, dtype: {"v": torch.ones(T)}
print(json.dumps(cpu.measure(cpu.Case("known", 65), repeat_for=0.1)))
"""


def test_time_and_memory():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert 0.02 <= found["seconds"] < 1.0
    assert 60 * MEGABYTES < found["bytes"] < 90 * MEGABYTES
    assert found["calls"] >= 3


def test_a_process_of_its_own():
    found = cpu.measure_apart(Case("chunk_simple_gla", 128, backward=True), repeat_for=0.0)
    assert found["seconds"] > 0
    assert found["calls"] == 3


def test_what_a_library_says_until_its_time_is_over(monkeypatch, tmp_path, capsys):
    """The peer's is limited; words beside findings do not count."""
    library = tmp_path / "python"
    library.write_text(
        """#!/bin/sh
        echo searching; echo '["a row", {"forward": 1.5}]'; exec sleep $NAP
        """
    )
    library.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(library))
    options = argparse.Namespace(rows="", peer=tmp_path)
    for name, nap in ((gpu.PEER, 60), ("ours", 3)):  # which has all the time that it takes
        monkeypatch.setenv("NAP", f"{nap}")
        start = time.monotonic()
        found = gpu._apart("kda", options, start + 2, name, gpu="0")
        assert 1.9 + (name == "ours") < time.monotonic() - start < 10
        assert found == {"a row": {"forward": 1.5}}
        assert capsys.readouterr().out == f"{name}: a row: forward 1.5\n"


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
    monkeypatch.setattr(cpu, "measure_apart", lambda case: dict(KNOWN))
    assert cpu.main(["--out", str(tmp_path / "measured")]) == 1  # 2 GB are too much
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "measured" / "cpu.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert len(written["rows"]) == len(list(cpu.rows()))
    for row in written["rows"]:
        assert row["name"] in printed
    reached = [row["value"] <= row["at_most"] for row in written["rows"]]
    assert [row["reached"] for row in written["rows"]] == reached
    assert printed.count("MISSED") == sum(not row["reached"] for row in written["rows"]) > 0


def test_what_is_not_installed_is_said_at_once(monkeypatch, capsys):
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cpu.main(["--rows", "transformers"])
    assert "expected transformers, which is not installed" in capsys.readouterr().err


def test_a_gpu_is_wanted(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "expected a CUDA GPU, this machine has none" in capsys.readouterr().err


def test_a_bar_stays_in_its_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    assert [*track(range(3), lambda item: "x" * 200)] == [0, 1, 2]
    drawn = capsys.readouterr().err.split("\r")
    assert len(drawn) == 5 and max(map(len, drawn)) == 39 + len("\x1b[K")


def test_every_row_names_operators_that_exist():
    for row in cpu.rows():
        for case in row.cases:
            assert case.operator in cpu.OPERATORS or case.operator == cpu.IMPORT


def test_the_peer_is_not_this_package():
    for name in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"):
        peer = cpu._transformers(name)
        assert peer.__module__.startswith("transformers.")
        assert not hasattr(peer, "__wrapped__")


@pytest.mark.parametrize(
    "more",
    [
        {"B": 2},
        {"gate": 2.0, "window": 30},
        {"gate": 2.0, "lengths": (30, 1, 69)},
        {"gate": 2.0, "lengths": (30, 1, 69), "decoding": True},
    ],
    ids=str,
)
def test_the_softmax_rows_are_compared_with_the_textbook(more, monkeypatch):
    """What all libraries are held to, a few queries at a time, is what the operators do."""
    monkeypatch.setattr(softmax_gpu, "_BLOCK", 4000)
    row = softmax_gpu.Row("", (None, None), **{"T": 100, "HQ": 4, "H": 2, "D": 8, **more})
    torch.manual_seed(0)
    rows = (1, len(row.lengths)) if row.decoding else (row.B, row.T)
    sizes = {"q": (*rows, 4, 8), "k": (row.B, 100, 2, 8), "v": (row.B, 100, 2, 8)}
    inputs = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    do = torch.randn_like(inputs["q"])
    if row.gate is not None:
        inputs["g"] = -torch.rand(row.B, 100, 4, dtype=torch.float64)
    call = attn_decoding_one_step if row.decoding else parallel_attn
    more = {"window_size": row.window}
    if row.lengths:
        more["cu_seqlens"] = torch.tensor([0, *accumulate(row.lengths)])
    found = suite.results(
        lambda **given: call(**given, **more), inputs, None if row.decoding else do
    )
    exact = softmax_gpu.in_fp64(row, {**inputs, "do": do})
    assert found.keys() <= exact.keys()
    errors = suite.errors(found, {name: exact[name] for name in found})
    assert errors and max(errors.values()) < 1e-12


@pytest.mark.parametrize(
    "more",
    [
        {"B": 2},
        {"gate": "slow", "lower_bound": None},
        {"gate": "mixed", "lower_bound": None, "lengths": (30, 1, 69)},
        {"T": 1, "B": 3, "recurrent": True},
    ],
    ids=str,
)
def test_the_delta_rows_are_compared_with_the_textbook(more):
    """What all libraries are held to, on a few heads, is what the operators do."""
    row = kda_gpu.Row("", (None, None), **{"T": 100, "H": 3, "D": 8, **more})
    inputs = {name: x.double() for name, x in row.inputs("cpu").items()}
    do = inputs.pop("do")
    found = suite.results(kda_gpu.fla(row, "cpu"), inputs, do)
    few, given = (
        {name: kda_gpu._few_heads(row, x) for name, x in each.items()}
        for each in (found, {**inputs, "do": do})
    )
    errors = suite.errors(few, kda_gpu.in_fp64(row, given))
    assert len(errors) == len(found) and max(errors.values()) < 1e-11


@pytest.mark.parametrize(
    "more",
    [
        {"gate": True, "state": True, "B": 2},
        {"gate": True, "lengths": (30, 1, 69)},
        {"operator": "chunk_lightning_attn"},
        {"operator": "fused_chunk_linear_attn", "normalize": True},
        {"operator": "parallel_simple_gla", "gate": True},
    ],
    ids=str,
)
def test_the_linear_rows_are_compared_with_the_textbook(more):
    row = linear_gpu.Row("", (None, None), **{"T": 100, "H": 4, "K": 8, "V": 16, **more})
    inputs = {name: x.double() for name, x in row.inputs("cpu").items()}
    do = inputs.pop("do")
    found = suite.results(linear_gpu.fla(row, "cpu"), inputs, do)
    errors = suite.errors(found, linear_gpu.in_fp64(row, {**inputs, "do": do}))
    assert len(errors) == len(found) and max(errors.values()) < 1e-11


def test_linear_rows_are_to_take_so_long_a_byte():
    rows = {row.name: row for row in linear_gpu.ROWS}
    found = {linear_gpu.ROWS[0].name: {"forward": 0.2, "backward": 0.8}}
    settled = {row.name: row.first for row in linear_gpu.settle(list(rows.values()), found)}
    assert settled["… packed"] == (0.2, 0.8)
    assert settled["… D64"] == pytest.approx((0.115, 0.46))
    for name, row in rows.items():
        assert row.a_byte or settled[name] == row.first
    assert linear_gpu.settle(list(rows.values()), {}) == list(rows.values())


def test_triton_stands_beside_what_has_kernels_for_hopper():
    assert suite.in_triton(lambda row: [row, *dispatch._forced])(1) == [1, "triton"]
    assert not dispatch._forced


def test_kernels_are_compiled_side_by_side(tmp_path):
    """Each call once, the failing ones too, and nothing is repeated to be timed."""

    def measure(row):
        times = [triton.testing.do_bench(lambda: None, quantiles=each) for each in ((), (0.5, 0.2))]
        (tmp_path / row.name).write_text(str(times))
        raise RuntimeError

    rows = [suite.Row(str(i), (None, None)) for i in range(5)]
    some = suite.Suite("some", rows, {"ours": measure})
    gpu._compile(some, [("ours", row) for row in rows])
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == dict.fromkeys(
        "01234", "[0.0, [0.0, 0.0]]"
    )


def test_processes_share_the_launches_of_a_search(tmp_path):
    """All are compiled, whatever fits their number least."""

    def measure(row):
        search = triton.autotune([triton.Config({}, num_warps=i) for i in range(1, 6)], ["n"])
        for config in search(triton.jit(_nothing)).prune_configs({}):
            (tmp_path / f"{row.name} {config.num_warps} {os.getpid()}").touch()
        return {}

    rows = [suite.Row(name, (None, None)) for name in "ab"]
    some = suite.Suite("some", rows, {gpu.PEER: measure})
    gpu._compile(some, [(gpu.PEER, row) for row in rows], shares=3)
    found = sorted(each.name.rsplit(" ", 1)[0] for each in tmp_path.iterdir())
    assert found == [f"{row} {i}" for row in "ab" for i in range(1, 6)]


def _nothing(n):
    pass


def test_searches_are_brief_and_measurements_are_not(monkeypatch):
    asked = []
    monkeypatch.setattr("triton.testing.do_bench", lambda run, **more: asked.append(more) or 1.0)
    with gpu._searching_briefly():
        of_search = CudaDriver.get_benchmarker(None)
        of_search(lambda: None, quantiles=(0.5,))
        suite.milliseconds(lambda: None)
    assert asked == [
        {"warmup": 5, "rep": 20, "quantiles": (0.5,)},
        *[{"warmup": 100, "rep": 100, "return_mode": "median"}] * 3,
    ]


@pytest.mark.parametrize(
    "cores, ours, peers, others",
    [({5, 2, 9, 7}, {9}, [2, 5], {5, 7}), ({1, 2}, {2}, [1], {1, 2}), ({4}, {4}, [4], {4})],
)
def test_what_is_measured_has_a_core_of_its_own(cores, ours, peers, others, monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: cores)
    monkeypatch.setattr(gpu.os, "sched_setaffinity", lambda _, some: taken.append(set(some)))
    measures = {"first_call": False, "compile": False, "claims": tmp_path}
    gpu._take_cores(argparse.Namespace(library="ours", **measures))
    for other in ("first_call", "compile"):
        gpu._take_cores(argparse.Namespace(library="ours", **measures | {other: True}))
    for _ in peers:
        gpu._take_cores(argparse.Namespace(library=gpu.PEER, **measures))
    assert taken == [ours, others, others, *({core} for core in peers)]


def test_a_row_is_measured_by_the_process_that_claims_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "_take_cores", lambda options: None)
    rows = [suite.Row(name, (None, None)) for name in ("first", "second", "third")]
    some = suite.Suite("some", rows, {"ours": lambda row: {"forward": 1.0}})
    command = {"library": "ours", "rows": "", "first_call": False, "compile": False}
    options = argparse.Namespace(**command, claims=tmp_path)
    (tmp_path / "second").mkdir()
    gpu.work(some, options)
    gpu.work(some, options)
    said = [json.loads(line)[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["first", "third"]


def test_wrong_results_are_not_timed():
    with pytest.raises(ArithmeticError, match="dq"):
        suite.errors({"dq": torch.tensor([1.1])}, {"dq": torch.tensor([1.0])})


@pytest.mark.parametrize("seen", [["1"], ["1", "3"], ["1", "3", "4"]])
def test_the_peer_has_all_gpus_when_all_else_is_measured(seen, monkeypatch):
    called = []

    def apart(engine, options, until, library, *more, gpu, cache=""):
        called.append((library, *more[:1], gpu))
        return {f"row on {gpu}": {"forward": 1.0}} if "--claims" in more else {}

    monkeypatch.setattr(gpu, "_apart", apart)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(seen))
    options = argparse.Namespace(peer="somewhere", rows="", patience=1.0)
    found = gpu._found("attn", softmax_gpu.SUITE, ["ours", "triton", gpu.PEER], options)
    rows = {f"row on {where}": {"forward": 1.0} for where in seen}
    assert found == {"ours": {}, "triton": {}, gpu.PEER: rows}
    compiling = [("ours", "--compile", "1"), (gpu.PEER, "--compile", seen[-1])]
    assert sorted(called[:2]) == sorted(compiling)
    assert called[2:5] == [("ours", "1"), ("triton", "1"), ("ours", "--first-call", "1")]
    assert sorted(called[5:]) == [(gpu.PEER, "--claims", where) for where in seen]


def test_gpu_results_hold_what_is_printed(monkeypatch, tmp_path, capsys):
    """One row is slower than it is to be, and one is missing."""
    slow, _, *others = softmax_gpu.ROWS
    fast = {"forward": 0.1, "backward": 0.2, "errors": {"o": 0.002}}
    found = {row.name: fast for row in others} | {slow.name: {**fast, "forward": 99.0}}
    monkeypatch.setattr(gpu, "_apart", lambda *_, **__: dict(found))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert gpu.main(["--only", "attn", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "softmax_gpu.json").read_text())
    assert written["device"] == "a GPU" and written["torch"] == torch.__version__
    assert [row["name"] for row in written["rows"]] == [row.name for row in softmax_gpu.ROWS]
    assert all(row["name"] in printed for row in written["rows"])
    assert printed.count(" !") == 2 and "no answer" in printed
    assert gpu.main(["--only", "attn", "--out", str(tmp_path), "--rows", "N(0, 1)"]) == 0


def test_rows_that_there_are_not(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "attn", "--rows", "nothing like it"])
    assert "--rows: no row contains 'nothing like it'" in capsys.readouterr().err


def test_rows_of_one_engine_start_no_other(monkeypatch):
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_run", lambda engine, *_: ran.append(engine) or True)
    assert gpu.main(["--rows", "attn_decoding"]) == 0
    assert ran == ["attn"]


# In place of Nsight Compute: runs nothing, and has counted a kernel of PyTorch's too.
NCU = """#!/bin/sh
for each; do case $each in --log-file=*) log=${each#*=};; esac; done
cat > $log <<TABLE
==PROF== Connected
"ID","Kernel Name",%s
"","",%s
"0","elementwise_kernel",%s
"1","walk_kernel",%s
"2","walk_kernel",%s
TABLE
echo compiling
echo '["a row", "forward", ["walk_kernel"]]'
echo '["a row", "backward", ["walk_kernel"]]'
"""


def test_what_is_counted_belongs_to_a_pass(monkeypatch, tmp_path, capsys):
    head, tail = counters._WAITING
    reasons = [f"{head}{each}{tail}" for each in ("barrier", "wait", "selected", "gmma", "math")]
    columns = [counters._TIME, *counters._BUSY.values(), *reasons]

    def line(*numbers):
        return ",".join(f'"{each}"' for each in numbers)

    busy = range(10, 10 + len(counters._BUSY))
    others = line(1, *busy, *[9] * 5)
    first, second = (line(x, *busy, 0.5, 3, 9, 2, 0) for x in ("1,500", "2,000,000.5"))
    names, units = line(*columns), line(*["x"] * len(columns))
    ncu = tmp_path / "ncu"
    ncu.write_text(NCU % (names, units, others, first, second))
    ncu.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "_machine", dict)
    assert counters.main(["--only", "linear", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "linear_gpu_counters.json").read_text())["kernels"]
    assert [each["pass"] for each in written] == ["forward", "backward"]
    assert [each["µs"] for each in written] == [1.5, 2000.0005]
    for each in written:
        assert each["busy, %"] == dict(zip(counters._BUSY, busy, strict=True))
        assert each["waiting"] == {"wait": 3, "gmma": 2, "barrier": 0.5}
    printed = capsys.readouterr().out
    assert "a row, backward" in printed and "wait 3.0, gmma 2.0, barrier 0.5" in printed
    ncu.write_text(ncu.read_text().replace('"walk_kernel"]', '"another_kernel"]'))
    with pytest.raises(RuntimeError, match="has not counted another_kernel"):
        counters.main(["--only", "linear"])
    ncu.write_text(NCU % (names, units, others, first, second + f'\n"3","walk_kernel",{second}'))
    with pytest.raises(RuntimeError, match="more than was launched: walk_kernel"):
        counters.main(["--only", "linear"])
    ncu.write_text(NCU % (names, units, others, "n/a", second))
    with pytest.raises(RuntimeError, match=f"no number for .*{counters._TIME}"):
        counters.main(["--only", "linear"])
    ncu.write_text("#!/bin/sh\nexit 1")
    with pytest.raises(RuntimeError, match="ncu failed"):
        counters.main(["--rows", "attn_decoding"])

"""Each engine on a GPU beside other libraries: ``python -m benchmarks gpu``.

Prints each finding as it comes, and a table last: ms, forward / backward, and the errors of 16-bit
results against fp64; a ``!`` is slower than the row is to be.  The findings stand in
``measured``, or in the directory ``--out``.  ``--peer`` names a directory into which ``pip install
--target DIRECTORY --no-deps fla-core==0.6.0`` has put that package; all GPUs share its rows, when
all else has been measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import OUT
from benchmarks.suite import Found, Row, Suite, reached

SUITES = {
    "attn": "benchmarks.softmax_gpu",
    "linear": "benchmarks.linear_gpu",
    "kda": "benchmarks.kda_gpu",
}
ROOT = Path(__file__).parent.parent
# Only it lies elsewhere, and runs in processes that find it there
PEER = "fla-core"


def parser_for(what: str, description: str | None) -> argparse.ArgumentParser:
    """For ``python -m benchmarks WHAT``, with the engines and rows that it is asked for."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {what}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=SUITES, help="one engine; all by default")
    parser.add_argument("--rows", default="", metavar="NAME", help="only rows that contain NAME")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIRECTORY", help="of the JSON")
    return parser


def meant(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """The modules of the engines that have a row that is asked for."""
    engines = [options.only] if options.only else list(SUITES)
    modules = {engine: importlib.import_module(SUITES[engine]) for engine in engines}
    found = {
        engine: module
        for engine, module in modules.items()
        if any(options.rows in row.name for row in module.SUITE.rows)
    }
    if not found:
        parser.error(f"--rows: no row contains {options.rows!r}")
    return found


def write(options: argparse.Namespace, name: str, found: Found) -> None:
    """Keep what was found, with where and when, if all rows were asked for."""
    if not options.rows:
        options.out.mkdir(parents=True, exist_ok=True)
        record = json.dumps({**_machine(), **found}, indent=1)
        (options.out / f"{name}.json").write_text(record + "\n")


def main(argv: list[str]) -> int:
    parser = parser_for("gpu", __doc__)
    parser.add_argument("--peer", type=Path, metavar="DIRECTORY", help="where fla-core lies")
    parser.add_argument(
        "--patience",
        type=float,
        default=1200,
        metavar="SECONDS",
        help="with fla-core in each engine, its rows until then count (default: %(default)g)",
    )
    parser.add_argument("--library", help="measure this one here and print lines of JSON")
    parser.add_argument("--first-call", action="store_true", help="of --library, instead of rows")
    parser.add_argument("--compile", action="store_true", help="its kernels only")
    parser.add_argument("--claims", type=Path, help="rows named there are another process's")
    options = parser.parse_args(argv)
    engines = meant(parser, options)
    if not options.library and not torch.cuda.is_available():  # after asking, no fork may use it
        parser.error("expected a CUDA GPU, this machine has none")
    if options.peer and not options.peer.is_dir():
        parser.error(f"--peer: expected a folder, {options.peer} is not one")
    passed = True
    for engine, module in engines.items():
        if options.library:
            work(module.SUITE, options)
        else:
            passed &= _run(engine, module.SUITE, options)
    return 0 if passed else 1


def work(suite: Suite, options: argparse.Namespace) -> None:
    """Measure a library in this process; one line of JSON for each finding."""
    if options.library == PEER:  # which would take modules that it lacks from this ``fla``
        sys.path.remove(str(ROOT))
    _take_cores(options)
    if options.first_call:
        _say("first call, s", suite.first_call() if suite.first_call else {})
        return
    rows = [row for row in suite.rows if options.rows in row.name]
    if options.compile:
        theirs = options.library == PEER
        libraries = [PEER] if theirs else [x for x in suite.libraries if x != PEER]
        calls = [(library, row) for row in rows for library in libraries]
        _compile(suite, calls, shares=3 if theirs else 1)
        return
    for row in rows:
        if _claimed(options.claims, row.name):
            with _searching_briefly():
                _say(row.name, _measure(suite, options.library, row))
    if suite.host and options.library in ("ours", PEER) and _claimed(options.claims, "host"):
        _say("host, ms", suite.host())


def _take_cores(options: argparse.Namespace) -> None:
    """A core of its own to what measures, the first to peers, else the last; to others the rest.

    Autograd's thread is woken there at once; where a core sleeps, after up to .3 ms, which is more
    than a small backward pass takes, and another number at every call.
    """
    cores = sorted(os.sched_getaffinity(0))
    if options.first_call or options.compile:
        mine = cores[1:-1] or cores
    elif options.library == PEER:
        mine = [next(core for core in cores if _claimed(options.claims, f"core {core}"))]
    else:
        mine = cores[-1:]
    os.sched_setaffinity(0, mine)


def _claimed(claims: Path | None, name: str) -> bool:
    """Whether no other process has taken it."""
    try:
        if claims:
            (claims / name).mkdir()
    except FileExistsError:
        return False
    return True


def _measure(suite: Suite, library: str, row: Row) -> Found:
    try:
        return suite.libraries[library](row)
    except Exception as problem:  # the other rows are still to be measured
        return {"problem": f"{type(problem).__name__}: {problem}"[:300]}
    finally:
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _searching_briefly() -> Iterator[None]:
    """Inside, Triton's autotuner times a launch for 25 ms: for 125, a suite's would be minutes."""
    from triton.testing import do_bench

    brief = functools.partial(do_bench, warmup=5, rep=20)  # where nothing else is asked for
    with mock.patch("triton.testing.do_bench", brief):
        yield


def _compile(suite: Suite, calls: list[tuple[str, Row]], shares: int = 1) -> None:
    """Measure side by side what is called once, for the kernels that are compiled then.

    Each call runs ``shares`` times, each time with its share of the launches that Triton's
    autotuner would search; neither times nor errors are worth anything here.
    """
    from triton.runtime.autotuner import Autotuner

    launches = Autotuner.prune_configs
    processes = max(min((os.cpu_count() or 2) - 2, 24), shares)  # each has a context on the GPU

    def some(first: int) -> None:
        def share(self: Any, *given: Any) -> list[Any]:
            every = launches(self, *given)
            return every[first % shares :: shares] or every[:1]

        with (
            mock.patch("triton.testing.do_bench", once),
            mock.patch.object(Autotuner, "prune_configs", share),
            mock.patch(f"{type(calls[0][1]).__module__}.in_fp64"),  # the suite's own
            mock.patch("benchmarks.suite.errors"),
        ):
            for library, row in calls[first // shares :: processes // shares]:
                if "problem" in (found := _measure(suite, library, row)):
                    print(f"compiling {library}: {row.name}: {_said(found)}", file=sys.stderr)

    def once(run: Callable[[], Any], *_: Any, quantiles: Sequence[float] = (), **__: Any) -> Any:
        run()  # in a search times are compared with those of launches that do not fit, three inf
        return [0.0] * len(quantiles) or 0.0

    fork = multiprocessing.get_context("fork")  # after imports, before the GPU is touched
    some_of = range(min(processes // shares, len(calls)) * shares)
    running = [fork.Process(target=some, args=(i,)) for i in some_of]
    for each in running:
        each.start()
    for each in running:
        each.join()


def _say(what: str, found: Found) -> None:
    print(json.dumps([what, found]), flush=True)


def _run(engine: str, suite: Suite, options: argparse.Namespace) -> bool:
    """Measure a suite in all its libraries; write and print what was found."""
    libraries = [name for name in suite.libraries if name != PEER or options.peer]
    found = _found(engine, suite, libraries, options)
    rows = [row for row in suite.rows if options.rows in row.name]
    rows = suite.settle(rows, found["ours"])
    measured = [
        dataclasses.asdict(row)
        | {name: each[row.name] for name, each in found.items() if each.get(row.name)}
        for row in rows
    ]
    costs = {
        what: {name: each[what] for name, each in found.items() if each.get(what)}
        for what in ("host, ms", "first call, s")
    }
    write(options, suite.name, {**costs, "rows": measured})
    for name, each in found.items():
        for row in rows:
            if "problem" in (answer := each.get(row.name, {"problem": "no answer"})):
                print(f"{name}: {row.name}: {_said(answer)}")
    for what, each in costs.items():
        for name, cost in each.items():
            print(f"{what}, {name}: {_said(cost)}")
    print(*suite.remarks(measured), sep="\n")
    print(*_table(rows, measured, libraries), sep="\n")
    return all(reached(row, each.get("ours", {})) for row, each in zip(rows, measured, strict=True))


def _found(
    engine: str, suite: Suite, libraries: list[str], options: argparse.Namespace
) -> dict[str, dict[str, Found]]:
    """One library after the other with nothing beside it, then the peer on all GPUs.

    What runs on other GPUs takes a fifth of the host's speed, and so of small calls.  The peer's
    own stand beside each other: its search for launches takes minutes.
    """
    gpus = _gpus()
    apart = functools.partial(_apart, engine, options, time.monotonic() + options.patience)
    with ThreadPoolExecutor() as beside, tempfile.TemporaryDirectory() as place:
        cache, claims = Path(place, "cache"), Path(place, "claims")
        claims.mkdir()
        compiling = [
            beside.submit(apart, name, "--compile", gpu=gpu)
            for name, gpu in (("ours", gpus[0]), (PEER, gpus[-1]))
            if name in libraries
        ]
        for each in compiling:
            each.result()
        found = {name: apart(name, gpu=gpus[0]) for name in libraries if name != PEER}
        if suite.first_call:
            found["ours"] |= apart("ours", "--first-call", gpu=gpus[0], cache=str(cache))
        if PEER in libraries:
            share = ("--claims", str(claims))  # of its rows, each is one process's
            running = [beside.submit(apart, PEER, *share, gpu=gpu) for gpu in gpus]
            answers = [each.result().items() for each in running]
            found[PEER] = dict(itertools.chain.from_iterable(answers))
    return found


def _gpus() -> list[str]:
    """Names that CUDA_VISIBLE_DEVICES has for the GPU to measure on, the first, and the others."""
    count = max(torch.cuda.device_count(), 1)
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")


def _apart(
    engine: str,
    options: argparse.Namespace,
    until: float,
    library: str,
    *more: str,
    gpu: str,
    cache: str = "",
) -> dict[str, Found]:
    """What ``work`` says in a process that finds ``fla`` in the library's directory, on one GPU.

    fla-core has time ``until`` then.  It would keep on disk what its search for launches finds, and
    find it again where it is measured: of what is compiled side by side, where nothing is timed,
    that is any launch.
    """
    seconds = max(until - time.monotonic(), 1) if library == PEER else 0  # which is no limit
    command = [sys.executable, "-m", "benchmarks", "gpu", "--only", engine, "--library", library]
    process = subprocess.Popen(
        ["timeout", str(seconds), *command, "--rows", options.rows, *more],
        cwd=options.peer if library == PEER else ROOT,  # comes first among the paths
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": gpu,
            "FLA_CACHE_RESULTS": "0",
            **({"TRITON_CACHE_DIR": cache} if cache else {}),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Found] = {}
    with process:
        for line in process.stdout or ():
            if line.startswith("["):
                what, each = json.loads(line)
                found[what] = each
                if each:
                    print(f"{library}: {what}: {_said(each)}", flush=True)
    return found


def _machine() -> dict[str, str]:
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }


def _table(rows: list[Row], measured: list[Found], libraries: list[str]) -> Iterator[str]:
    from fla.testing.report import aligned

    lines = [["forward / backward, ms", "first", *libraries, "errors"]]
    for row, each in zip(rows, measured, strict=True):
        cells = [_ms(each.get(name, {})) for name in libraries]
        cells[0] += "" if reached(row, each.get("ours", {})) else " !"
        first = " / ".join(f"{x:.2f}" for x in row.first if x is not None)
        off = " ".join(f"{x} {y:.1e}" for x, y in each.get("ours", {}).get("errors", {}).items())
        lines.append([row.name, first, *cells, off])
    return aligned(lines)


def _said(found: Found) -> str:
    numbers = (f"{x} {y:.3g}" for x, y in found.items() if isinstance(y, float))
    return found.get("problem") or ", ".join(numbers)


def _ms(found: Found) -> str:
    if "problem" in found:
        return "problem"
    return " / ".join(f"{found[x]:.3f}" for x in ("forward", "backward") if x in found)

"""``fla info`` and ``fla check``, and the distribution that they belong to."""

import dataclasses
import itertools
from importlib import metadata

import pytest

import fla
from fla.cli import DISTRIBUTION, main
from fla.ops.common.dispatch import Engine
from fla.testing import all_specs, check


@pytest.fixture
def one_operator(monkeypatch):
    """``fla check`` over a single operator, as it is or changed."""
    spec = next(spec for spec in all_specs() if spec.name == "chunk_simple_gla")
    spec = dataclasses.replace(spec, variants={"plain": {}, "gate": spec.variants["gate"]})

    def use(**changes):
        monkeypatch.setattr(check, "all_specs", lambda: [dataclasses.replace(spec, **changes)])
        return spec

    return use


def test_the_distribution_owns_the_package():
    assert set(metadata.packages_distributions()["fla"]) == {DISTRIBUTION}
    assert metadata.version(DISTRIBUTION) == fla.__version__


def test_info_names_versions_and_implementations(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"fla     {fla.__version__}" in printed
    for engine in Engine.registry.values():
        assert f"{engine.name} engine" in printed
    assert "eager" in printed
    assert "runs" in printed
    assert "warning" not in printed


def test_info_warns_of_another_owner(capsys, monkeypatch, tmp_path):
    other = tmp_path / "other_fla-0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-fla\nVersion: 0.1\n")
    (other / "RECORD").write_text("fla/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["info"]) == 0
    assert "warning: other-fla 0.1 has laid files into fla/" in capsys.readouterr().out


def test_check_passes(capsys, one_operator):
    one_operator()
    assert main(["check"]) == 0
    printed = capsys.readouterr()
    assert "0 failures" in printed.out
    assert "dg" in printed.out
    assert "chunk_simple_gla on cpu" in printed.err  # progress


def test_check_fails_on_a_wrong_output(capsys, one_operator):
    run = one_operator().run
    one_operator(run=lambda **arguments: (run(**arguments)[0] * 1.1, None))
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "o is off by 1.0e-01, expected 1.0e-05" in printed
    assert "1e-01!" in printed


def test_check_fails_on_a_wrong_gradient(capsys, one_operator):
    run = one_operator().run
    one_operator(run=lambda v, **arguments: run(v=2 * v - v.detach(), **arguments))
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "dv is off by 1.0e+00" in printed
    assert "o is off" not in printed


def test_check_fails_on_an_exception_and_goes_on(capsys, one_operator):
    def broken(**arguments):
        raise RuntimeError("no such thing")

    one_operator(run=broken)
    assert main(["check"]) == 1
    assert "16 calls, 16 failures" in capsys.readouterr().out


def test_check_shows_what_was_done_when_it_is_stopped(capsys, one_operator):
    spec, calls = one_operator(), itertools.count()

    def stopped(**arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return spec.run(**arguments)

    one_operator(run=stopped)
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "stopped before 13 of 16 calls" in printed
    assert "dq" in printed
    assert "3 calls, 0 failures" in printed


def test_a_command_is_wanted(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "command" in capsys.readouterr().err

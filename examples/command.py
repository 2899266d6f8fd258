"""What the command lines of the examples share."""

from __future__ import annotations

import argparse
import functools
import io
import sys
from collections.abc import Callable, Sequence

import torch


def entry(main: Callable[..., int]) -> Callable[..., int]:
    """``main`` with one line for wrong arguments, and one for Ctrl-C behind what was done."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal may not know all characters
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130

    return run


def parser(program: str, text: str | None) -> argparse.ArgumentParser:
    """A parser with ``--device``, whose help is the program's own docstring."""
    first, _, rest = (text or "").partition("\n")
    made = argparse.ArgumentParser(
        prog=f"python -m examples.{program}",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda, default here %(default)s",
    )
    return made


def device(name: str) -> str:
    """The name of a device that tensors can live on here."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"expected a device of this machine, got {name}: {reason}"
        ) from None
    return name

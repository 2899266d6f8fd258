"""Train a small language model over bytes, on a text of yours or on the built-in language.

    python -m examples.train --checkpoint runs/ledgers.pt     # KDA, built-in language
    python -m examples.train --mixer lightning --text book.txt --checkpoint runs/book.pt
    python -m examples.train --mixer lightning --text book.txt --checkpoint runs/book.pt --resume
    python -m examples.generate runs/book.pt --prompt "It was"

Batches are packed: documents stand behind one another in a row, and no layer looks across their
boundaries.  The checkpoint is written now and then, at the end, and on Ctrl-C; with ``--resume``
the run goes on as if it had never stopped, to the last bit on the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from examples import command
from examples.data import Batch, Corpus, ledgers, read
from examples.model import MIXERS, Config, LanguageModel
from examples.progress import Progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEDGERS = 2000


@dataclasses.dataclass(frozen=True)
class Run:
    """How a model is trained."""

    steps: int = 400
    tokens: int = 1024  # a step
    context: int = 512
    learning_rate: float = 3e-3
    dtype: str = "fp32"  # of products: bf16 runs under autocast, parameters stay fp32
    seed: int = 0
    evaluations: int = 16

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "context", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate: expected a finite number above 0, got {self.learning_rate}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype}")


class Trainer:
    """A model, its optimizer and where it stands in its data: all that a checkpoint holds."""

    def __init__(self, config: Config, run: Run, corpus: Corpus, device: str = "cpu"):
        torch.manual_seed(run.seed)
        self.config, self.run, self.corpus, self.device = config, run, corpus, device
        self.model = LanguageModel(config).to(device)
        self.optimizer = torch.optim.AdamW(_groups(self.model), betas=(0.9, 0.95))
        self.generator = torch.Generator().manual_seed(run.seed)  # draws the data
        self.step = 0
        self.losses: list[float] = []  # of each step
        self.held_out: list[tuple[int, float]] = []  # step and loss

    def advance(self) -> float:
        """One step of the optimizer; its loss."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.learning_rate * schedule(self.step / self.run.steps)
        loss = self._losses(self.corpus.batch(self.run.tokens, self.generator)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss on the documents held out, in nats per byte."""
        self.model.eval()
        batches = self.corpus.held_out_batches(max(self.run.tokens, self.run.context))
        loss = torch.cat([self._losses(batch) for batch in batches]).mean().item()
        self.held_out.append((self.step, loss))
        return loss

    def _losses(self, batch: Batch) -> Tensor:
        inputs, targets, cu_seqlens = (x.to(self.device) for x in batch)
        dtype = DTYPES[self.run.dtype]
        with torch.autocast(torch.device(self.device).type, dtype, dtype != torch.float32):
            logits = self.model(inputs, cu_seqlens=cu_seqlens)
        return F.cross_entropy(logits[0].float(), targets[0], reduction="none")

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with for this run to go on from it."""
        made = {**dataclasses.asdict(self.config), **dataclasses.asdict(self.run)}
        return {**made, "text": f"checksum {self.corpus.fingerprint:08x}"}

    def save(self, path: Path) -> None:
        """Write a checkpoint; a file that is there stays whole until the new one is."""
        checkpoint = {
            "settings": self.settings(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "losses": self.losses,
            "held_out": self.held_out,
        }
        unfinished = path.with_name(path.name + ".unfinished")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
            os.replace(unfinished, path)
        except (OSError, RuntimeError) as error:  # of a full disk torch.save has one of its own
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise ValueError(f"checkpoint: {path} cannot be written: {reason}") from None
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def load(self, path: Path) -> None:
        """Go on where the run of a checkpoint stopped."""
        checkpoint = read_checkpoint(path)
        agree(path, checkpoint["settings"], self.settings())
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.generator.set_state(checkpoint["generator"])
        self.step, self.losses = checkpoint["step"], checkpoint["losses"]
        self.held_out = [(step, loss) for step, loss in checkpoint["held_out"]]


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, gains, biases and gates' constants do not."""
    parameters = list(model.parameters())
    return [
        {"params": [x for x in parameters if x.dim() >= 2], "weight_decay": 0.1},
        {"params": [x for x in parameters if x.dim() < 2], "weight_decay": 0.0},
    ]


def schedule(part: float, warm_up: float = 0.05, least: float = 0.05) -> float:
    """The learning rate's factor after this part of a run: a linear rise, then a cosine's fall."""
    if part < warm_up:
        return (part + 0.01 * warm_up) / warm_up
    fall = (part - warm_up) / (1 - warm_up)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * fall))


def read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"checkpoint: expected a file, {path} is not there") from None
    except Exception as error:
        raise ValueError(f"checkpoint: {path} cannot be read: {error}") from None
    if not isinstance(checkpoint, dict) or "settings" not in checkpoint:
        raise ValueError(f"checkpoint: {path} is not one of examples.train")
    return checkpoint


def agree(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """All settings that differ, in one error."""
    names = [name for name in expected if found.get(name) != expected[name]]
    if names:
        wanted = ", ".join(f"{name} {expected[name]}" for name in names)
        got = ", ".join(f"{name} {found.get(name)}" for name in names)
        raise ValueError(f"checkpoint: {path}: expected {wanted}, got {got}")


def fit(trainer: Trainer, checkpoint: Path | None = None, every: int = 100) -> bool:
    """Train to the end, with a bar and checkpoints; False if Ctrl-C came first."""
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    if checkpoint:
        trainer.save(checkpoint)  # if it cannot be, that is better known now
    steps, apart = trainer.run.steps, max(trainer.run.steps // trainer.run.evaluations, 1)
    with Progress(trainer.config.mixer, steps, trainer.step) as bar, interruption() as interrupted:
        while trainer.step < steps and not interrupted:
            loss = trainer.advance()
            if trainer.step % apart == 0 or trainer.step == steps:
                trainer.evaluate()
            if checkpoint and trainer.step % every == 0:
                trainer.save(checkpoint)
            bar.update(trainer.step, f"loss {loss:.3f}")
    if checkpoint:
        trainer.save(checkpoint)
    return trainer.step == steps


@contextlib.contextmanager
def interruption() -> Iterator[list[int]]:
    """Ctrl-C ends up in this list, so that a step is never left half done; a second one counts."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


@command.entry
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    given = vars(options)
    config = Config(**{each.name: given[each.name] for each in _fields(Config, given)})
    run = Run(**{each.name: given[each.name] for each in _fields(Run, given)})
    path = options.checkpoint
    if path and path.exists() and not options.resume:
        raise ValueError(f"checkpoint: {path} is there: --resume goes on from it")
    if options.resume and not path:
        raise ValueError("resume: expected --checkpoint with it")
    trainer = Trainer(config, run, _corpus(options.text, run.context), options.device)
    if options.resume:
        trainer.load(path)
        print(f"going on from step {trainer.step} of {path}")
    finished = fit(trainer, path, options.every)
    if not finished:
        print(f"stopped after step {trainer.step}" + (f", {path} goes on" if path else ""))
        return 130
    report(trainer)
    return 0


def _corpus(text: Path | None, context: int) -> Corpus:
    if text is None:
        return Corpus(ledgers(LEDGERS), context)
    if not text.is_file():
        raise ValueError(f"text: expected a file, {text} is not one")
    return Corpus(read(text), context)


def report(trainer: Trainer) -> None:
    print(f"{trainer.config.mixer}: {trainer.model.parameter_count():,} parameters")
    print(f"held-out loss of the model    {trainer.held_out[-1][1]:.3f} nats per byte")
    print(f"held-out loss of a bigram     {trainer.corpus.bigram_loss():.3f} nats per byte")


def _fields(kind: Any, given: dict[str, Any]) -> list[dataclasses.Field]:
    return [each for each in dataclasses.fields(kind) if each.name in given]


def _parser() -> argparse.ArgumentParser:
    made = command.parser("train", __doc__)
    config, run = Config(), Run()
    add = made.add_argument
    add("--mixer", choices=MIXERS, default=config.mixer, help=f"default {config.mixer}")
    add("--text", type=Path, help="a text file, documents two blank lines apart; built-in if none")
    add("--width", type=int, default=config.width, help=f"of the model, default {config.width}")
    add("--layers", type=int, default=config.layers, help=f"default {config.layers}")
    add("--heads", type=int, default=config.heads, help=f"of each mixer, default {config.heads}")
    add("--steps", type=int, default=run.steps, help=f"of the optimizer, default {run.steps}")
    add("--tokens", type=int, default=run.tokens, help=f"bytes a step, default {run.tokens}")
    add("--context", type=int, default=run.context, help=f"longest piece, default {run.context}")
    add(
        "--learning-rate",
        type=float,
        default=run.learning_rate,
        help=f"highest, default {run.learning_rate}",
    )
    add("--dtype", choices=DTYPES, default=run.dtype, help="of products, default fp32")
    add("--seed", type=int, default=run.seed, help="of parameters and data")
    add("--checkpoint", type=Path, help="where to keep the run, for --resume and generate")
    add("--every", type=int, default=100, help="steps between checkpoints, default 100")
    add("--resume", action="store_true", help="go on from the checkpoint")
    return made


if __name__ == "__main__":
    sys.exit(main())

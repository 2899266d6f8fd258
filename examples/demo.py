"""Train, generate, compare, recall, measure; and show it all in one page.

    make demo
    python -m examples.demo --device cuda --out demo/page.html

The model is kept beside the page; ``python -m examples.generate demo/kda.pt`` writes more with it.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

import fla
from examples import command
from examples.cost import LENGTHS, OPERATORS, Measured, costs
from examples.data import Corpus, ledgers
from examples.generate import document, largest_difference, seconds_per_token
from examples.model import MIXERS, Config
from examples.page import Results, Training, page, start_and_end
from examples.recall import Task, recall
from examples.train import LEDGERS, Run, Trainer, fit, report

GIVEN, WRITTEN = 40, 400  # items of a ledger that it goes on from, and the bytes it then writes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much the demo does."""

    run: Run = dataclasses.field(default_factory=Run)
    task: Task = dataclasses.field(default_factory=Task)
    decoded: int = 1000
    lengths: Sequence[int] = ()


@command.entry
def main(argv: Sequence[str] | None = None) -> int:
    parser = command.parser("demo", __doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/page.html"), help="the page")
    options = parser.parse_args(argv)
    return demo(options.out, options.device, Sizes())


def demo(out: Path, device: str, sizes: Sizes) -> int:
    began = time.monotonic()
    if out.is_dir():
        raise ValueError(f"out: expected a file, {out} is a folder")
    print("Training a language model of Kimi Delta Attention on ledgers, the built-in language")
    trainer = Trainer(Config("kda"), sizes.run, Corpus(ledgers(LEDGERS), sizes.run.context), device)
    if not fit(trainer, out.with_name("kda.pt")):
        raise KeyboardInterrupt
    training = _training(trainer, time.monotonic() - began)
    report(trainer)

    prompt = trainer.corpus.documents[1][0][: 4 * GIVEN]
    sample = document(trainer.model, prompt, WRITTEN, temperature=0.8)
    print(f"\nWhat it writes after {sample[: len(prompt)]}\n{sample[len(prompt) :]}\n")

    right = answered_right(trainer)
    print(f"questions in held-out ledgers answered right: {100 * right:.0f}%, guessing: 10%")
    text = next(trainer.corpus.held_out_batches(sizes.run.tokens))[0].to(device)
    difference = largest_difference(trainer.model, text)
    print(f"largest difference of logits, chunked and recurrent: {difference[0]:.1e}")
    decoding = seconds_per_token(trainer.model, prompt, sizes.decoded)
    start, end = start_and_end(decoding)
    print(f"a byte takes {start * 1e3:.2f} ms at the start, {end * 1e3:.2f} ms at the end")

    print("\nRecall, for every mixer")
    shares = {mixer: recall(mixer, sizes.task, device) for mixer in MIXERS}
    print("\nTime and memory against length, for every operator")
    lengths = sizes.lengths or LENGTHS[torch.device(device).type]
    spent: dict[str, list[Measured]] = {label: [] for label in OPERATORS}
    for label, measured in costs(device, lengths):
        spent[label].append(measured)
    results = Results(
        machine=machine(device),
        training=training,
        given=GIVEN,
        sample=sample,
        right=right,
        difference=difference,
        decoding=decoding,
        task=sizes.task,
        recall=shares,
        lengths=lengths,
        costs=spent,
        seconds=time.monotonic() - began,
    )
    out.write_text(page(results), encoding="utf-8")
    print(f"wrote {out}")
    return 0


def _training(trainer: Trainer, seconds: float) -> Training:
    return Training(
        losses=trainer.losses,
        held_out=trainer.held_out,
        bigram=trainer.corpus.bigram_loss(),
        parameters=trainer.model.parameter_count(),
        bytes_a_step=trainer.run.tokens,
        seconds=seconds,
    )


@torch.no_grad()
def answered_right(trainer: Trainer) -> float:
    """Share of questions in held-out ledgers whose answer the model finds most likely."""
    trainer.model.eval()
    right = []
    for batch in trainer.corpus.held_out_batches(trainer.run.tokens):
        inputs, targets, cu_seqlens = (x.to(trainer.device) for x in batch)
        logits = trainer.model(inputs, cu_seqlens=cu_seqlens)
        right.append((logits.argmax(-1) == targets)[inputs == ord("?")])
    return torch.cat(right).float().mean().item()


def machine(device: str) -> dict[str, str]:
    where = f"{platform.machine()}, {torch.get_num_threads()} CPU threads"
    if torch.device(device).type == "cuda":
        where = torch.cuda.get_device_name(device)
    return {
        "date": date.today().isoformat(),
        "where": where,
        "python": f"Python {platform.python_version()}",
        "torch": f"PyTorch {torch.__version__}",
        "fla": f"fla {fla.__version__}",
    }


if __name__ == "__main__":
    sys.exit(main())

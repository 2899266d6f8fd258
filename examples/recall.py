"""What a memory can hold: the last value of a variable, asked for long after it was written.

    python -m examples.recall                      # every mixer
    python -m examples.recall --mixer kda linear

A sequence is a stream of writes and questions.  A write gives one of 16 variables a new value, a
question names a variable, and the answer is the value that was written to it last.  Variables are
written again and again: a memory that only adds holds all their values at once, one that decays
forgets the old ones with the time, and one that corrects itself puts the new one in their place.

Each position is one write or one question, so that nothing depends on how a mixer looks at its
neighbours; the models are one block each, without short convolutions, and trained alike.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import command
from examples.model import MIXERS, Blocks, Config
from examples.progress import Progress
from examples.train import schedule
from fla.testing.report import aligned

CHUNK = 64
DISTANCES = [1, 16, 32, 64, 96, 128, 192, 256]  # each bin ends before the next number


@dataclasses.dataclass(frozen=True)
class Task:
    """Sequences of writes and questions, and how a model is trained on them."""

    variables: int = 16
    values: int = 16
    writes: float = 0.2  # share of positions
    length: int = 384
    batch: int = 4
    steps: int = 300
    tested: int = 64  # sequences
    learning_rate: float = 6e-3
    warm_up: float = 0.3  # share of the steps

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``[batch, length]`` each: variables; values written, 0 in a question; answers, −1 in a
        write; and how long ago the answer was written."""
        shape = batch, self.length
        writes = torch.rand(shape, generator=generator) < self.writes
        writes[:, 0] = True
        written = torch.randint(self.variables, shape, generator=generator)
        values = torch.randint(1, self.values + 1, shape, generator=generator)
        times = torch.arange(self.length)
        here = writes[..., None] & (written[..., None] == torch.arange(self.variables))
        last = torch.where(here, times[:, None], -1).cummax(1).values  # [batch, length, variables]
        asked = torch.multinomial((last >= 0).float().flatten(0, 1), 1, generator=generator)
        variables = torch.where(writes, written, asked.view(shape))
        source = last.gather(2, variables[..., None])[..., 0]
        answers = torch.where(writes, -1, values.gather(1, source))
        return variables, torch.where(writes, values, 0), answers, times - source


class Reader(nn.Module):
    """Embeddings of variable and value, added; a body of one block; a head for the values."""

    def __init__(self, mixer: str, task: Task, width: int = 64):
        super().__init__()
        self.variable = nn.Embedding(task.variables, width)
        self.value = nn.Embedding(task.values + 1, width)
        self.body = Blocks(Config(mixer, width=width, layers=1, heads=2, short_conv=False))
        self.head = nn.Linear(width, task.values + 1)

    def forward(self, variables: Tensor, values: Tensor) -> Tensor:
        return self.head(self.body(self.variable(variables) + self.value(values)))


def recall(mixer: str, task: Task, device: str = "cpu") -> list[float]:
    """Share of right answers in each bin of ``DISTANCES``, of a model trained from scratch."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Reader(mixer, task).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    with Progress(f"recall, {mixer}", task.steps) as bar:
        for step in range(task.steps):
            for group in optimizer.param_groups:
                group["lr"] = task.learning_rate * schedule(step / task.steps, task.warm_up)
            drawn = (x.to(device) for x in task.draw(task.batch, generator))
            variables, values, answers, _ = drawn
            logits = model(variables, values).flatten(0, 1)
            loss = F.cross_entropy(logits, answers.flatten(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.update(step + 1, f"loss {loss.item():.3f}")
    return accuracies(model, task, device)


@torch.no_grad()
def accuracies(model: Reader, task: Task, device: str) -> list[float]:
    """On sequences that no training has drawn."""
    model.eval()
    drawn = task.draw(task.tested, torch.Generator().manual_seed(1))
    variables, values, answers, ages = (x.to(device) for x in drawn)
    right = model(variables, values).argmax(-1) == answers
    bins = torch.bucketize(ages, torch.tensor(DISTANCES, device=device), right=True)
    asked = answers >= 0
    return [right[asked & (bins == i)].float().mean().item() for i in range(1, len(DISTANCES) + 1)]


def bins(task: Task) -> list[str]:
    ends = [*DISTANCES[1:], task.length]
    return [f"{start}-{end - 1}" for start, end in zip(DISTANCES, ends, strict=True)]


@command.entry
def main(argv: Sequence[str] | None = None) -> int:
    parser = command.parser("recall", __doc__)
    task = Task()
    parser.add_argument("--mixer", nargs="+", choices=MIXERS, default=list(MIXERS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=task.steps, help=f"default {task.steps}")
    parser.add_argument("--length", type=int, default=task.length, help=f"default {task.length}")
    options = parser.parse_args(argv)
    if options.length <= DISTANCES[-1]:
        parser.error(f"--length: expected more than {DISTANCES[-1]}, got {options.length}")
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    task = dataclasses.replace(task, steps=options.steps, length=options.length)
    rows = [["right answers, %, at distance", *bins(task)]]
    try:
        for mixer in options.mixer:
            shares = recall(mixer, task, options.device)
            rows.append([mixer, *(f"{100 * share:.0f}" for share in shares)])
    finally:
        print(*aligned(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write on from a prompt, from the state and a byte at a time.

    python -m examples.generate runs/ledgers.pt --prompt "a=1 b=2 c=3 "

The prompt is read in the chunked form; each byte after it takes the recurrent form and costs the
same, however many came before (softmax attention looks back at all of them).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples import command
from examples.data import EDGE
from examples.model import Config, LanguageModel
from examples.train import read_checkpoint
from fla.layers import Cache


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: bytes,
    generator: torch.Generator,
    temperature: float = 0.7,
) -> Iterator[int]:
    """Bytes that follow the prompt, without end; a document's edge is among them."""
    model.eval()
    device = model.embedding.weight.device
    cache = Cache()
    tokens = torch.tensor([[EDGE, *prompt]], device=device)
    while True:
        logits = model(tokens, cache=cache)[0, -1].float().cpu()
        weights = (logits / max(temperature, 1e-4)).softmax(-1)
        token = int(torch.multinomial(weights, 1, generator=generator))
        yield token
        tokens = torch.tensor([[token]], device=device)


def document(
    model: LanguageModel, prompt: bytes, length: int, seed: int = 0, temperature: float = 0.7
) -> str:
    """The prompt and what follows, up to the end of the document or ``length`` bytes."""
    written = bytearray(prompt)
    stream = generate(model, prompt, torch.Generator().manual_seed(seed), temperature)
    for _, token in zip(range(length), stream, strict=False):
        if token == EDGE:
            break
        written.append(token)
    return written.decode(errors="replace")


def seconds_per_token(model: LanguageModel, prompt: bytes, tokens: int) -> list[float]:
    """How long each of so many tokens took, the lesser of two runs: a machine may be shared."""
    runs = [
        _seconds(generate(model, prompt, torch.Generator().manual_seed(0)), tokens)
        for _ in range(2)
    ]
    return [min(both) for both in zip(*runs, strict=True)]


def _seconds(stream: Iterator[int], tokens: int) -> list[float]:
    next(stream)
    seconds = []
    for _ in range(tokens):
        began = time.perf_counter()
        next(stream)
        seconds.append(time.perf_counter() - began)
    return seconds


@torch.inference_mode()
def largest_difference(model: LanguageModel, tokens: Tensor) -> tuple[float, float]:
    """Between logits of a whole text in chunks and those of its bytes one by one; and the largest.

    ``tokens`` is ``[1, T]``.
    """
    model.eval()
    chunked = model(tokens)
    cache = Cache()
    recurrent = torch.cat(
        [model(tokens[:, t : t + 1], cache=cache) for t in range(tokens.shape[1])], 1
    )
    return (chunked - recurrent).abs().max().item(), chunked.abs().max().item()


def load(path: Path, device: str) -> LanguageModel:
    """The model of a checkpoint of ``examples.train``."""
    checkpoint = read_checkpoint(path)
    settings = checkpoint["settings"]
    names = Config.__dataclass_fields__
    model = LanguageModel(Config(**{name: settings[name] for name in names}))
    model.load_state_dict(checkpoint["model"])
    return model.to(device)


@command.entry
def main(argv: Sequence[str] | None = None) -> int:
    parser = command.parser("generate", __doc__)
    parser.add_argument("checkpoint", type=Path, help="what examples.train wrote")
    parser.add_argument("--prompt", default="", help="what the document begins with")
    parser.add_argument("--length", type=int, default=1000, help="most bytes, default 1000")
    parser.add_argument("--temperature", type=float, default=0.7, help="default 0.7")
    parser.add_argument("--seed", type=int, default=0, help="another number, another document")
    options = parser.parse_args(argv)
    if options.length < 0:
        parser.error(f"--length: expected at least 0, got {options.length}")
    if not 0 <= options.temperature < math.inf:
        parser.error(f"--temperature: expected a finite number from 0, got {options.temperature}")
    model = load(options.checkpoint, options.device)
    prompt = os.fsencode(options.prompt)
    print(document(model, prompt, options.length, options.seed, options.temperature))
    return 0


if __name__ == "__main__":
    sys.exit(main())

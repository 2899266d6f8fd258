"""Text for a language model over bytes: a built-in language, or a file; packing; a baseline.

The built-in language needs no download.  Its documents are ledgers, made up from a seed: ``k=7``
notes that k is 7 from here on, and ``k?7`` asks for k and answers.  Letters are noted again and
again, and what the right answer is has often been written hundreds of bytes before.

    corpus = Corpus(ledgers(2000), context=512)
    inputs, targets, cu_seqlens = corpus.batch(tokens=1024, generator=generator)
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
LETTERS_OF_A_LEDGER = 8
NOTES = 0.25  # share of items; the others ask

EDGE = 0  # the byte where a document begins and ends
HELD_OUT = 0.05
MOST_HELD_OUT = 16384  # tokens; enough for a loss to two digits, and soon evaluated

Batch = tuple[Tensor, Tensor, Tensor]


def ledgers(count: int, seed: int = 0) -> list[bytes]:
    """Documents of the built-in language; the same for the same seed, everywhere."""
    return [ledger(random.Random(f"{seed} {i}")).encode() for i in range(count)]


def ledger(rng: random.Random) -> str:
    letters = rng.sample(LETTERS, LETTERS_OF_A_LEDGER)
    known: dict[str, str] = {}
    items = []
    for _ in range(rng.randrange(80, 120)):
        letter = rng.choice(letters)
        if letter not in known or rng.random() < NOTES:
            known[letter] = rng.choice(DIGITS)
            items.append(f"{letter}={known[letter]}")
        else:
            items.append(f"{letter}?{known[letter]}")
    return " ".join(items)


def marked(text: str) -> Iterator[tuple[str, str]]:
    """The items of a ledger, each with a verdict.

    An answer is ``right`` or ``wrong``, or ``unknown`` for a letter that was not noted before; what
    is no answer has the empty verdict.
    """
    known: dict[str, str] = {}
    for item in text.split(" "):
        letter, mark, digit = item[:1], item[1:2], item[2:]
        verdict = ""
        if mark == "=":
            known[letter] = digit
        elif mark == "?":
            right = "right" if known.get(letter) == digit else "wrong"
            verdict = right if letter in known else "unknown"
        yield item, verdict


def read(path: Path) -> list[bytes]:
    """The documents of a text file: two blank lines or more stand between one and the next."""
    text = path.read_bytes().replace(b"\r\n", b"\n").replace(bytes([EDGE]), b"")
    return [document for part in text.split(b"\n\n\n") if (document := part.strip(b"\n"))]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Documents cut into pieces of at most ``context`` bytes, each with the byte that follows."""

    text: Tensor  # [total], uint8, all documents between edges
    starts: list[int]
    lengths: list[int]

    @staticmethod
    def of(documents: list[bytes], context: int) -> Pieces:
        edge, starts, lengths, total = bytes([EDGE]), [], [], 0
        for document in documents:
            length = len(document) + 1  # a prediction for each byte and for the edge behind them
            for start in range(0, length, context):
                starts.append(total + start)
                lengths.append(min(context, length - start))
            total += len(document) + 2
        joined = b"".join(edge + document + edge for document in documents)
        return Pieces(torch.frombuffer(bytearray(joined), dtype=torch.uint8), starts, lengths)

    def pack(self, chosen: list[int], tokens: int) -> Batch:
        """Pieces behind one another, at most ``tokens`` of them: the last may be cut."""
        inputs, targets, bounds = [], [], [0]
        for piece in chosen:
            start, length = self.starts[piece], min(self.lengths[piece], tokens - bounds[-1])
            inputs.append(self.text[start : start + length])
            targets.append(self.text[start + 1 : start + 1 + length])
            bounds.append(bounds[-1] + length)
        packed = (torch.cat(each).long()[None] for each in (inputs, targets))
        return *packed, torch.tensor(bounds, dtype=torch.int32)  # type: ignore[return-value]


def hold_out(documents: list[bytes], most: int) -> tuple[list[bytes], list[bytes]]:
    """Documents to train on, and the last ones of ``most`` bytes, or the end of a long one."""
    trained = list(documents)
    held_out: list[bytes] = []
    while len(trained[-1]) <= most:
        held_out.insert(0, trained.pop())
        most -= len(held_out[0])
    if not held_out:
        long = trained.pop()
        trained, held_out = [*trained, long[:-most]], [long[-most:]]
    return trained, held_out


class Corpus:
    """Documents to train on and documents held out, cut into pieces and packed into batches."""

    def __init__(self, documents: list[bytes], context: int):
        total = sum(map(len, documents))
        if total < 2 * context:
            raise ValueError(
                f"text: expected at least two contexts of {context} bytes, got {total} bytes"
            )
        self.documents = hold_out(documents, max(round(total * HELD_OUT), 1))
        self.train, self.held_out = (Pieces.of(each, context) for each in self.documents)
        self.fingerprint = zlib.crc32(b"\0".join(documents))

    def batch(self, tokens: int, generator: torch.Generator) -> Batch:
        """Pieces drawn at random: inputs and targets ``[1, tokens]``, and boundaries."""
        chosen, filled = [], 0
        while filled < tokens:
            piece = int(torch.randint(len(self.train.starts), (), generator=generator))
            chosen.append(piece)
            filled += self.train.lengths[piece]
        return self.train.pack(chosen, tokens)

    def held_out_batches(self, tokens: int) -> Iterator[Batch]:
        """Each piece that is held out once, in order, up to a number of tokens."""
        chosen: list[int] = []
        filled = total = 0
        for piece, length in enumerate(self.held_out.lengths):
            if chosen and filled + length > tokens:
                yield self.held_out.pack(chosen, tokens)
                chosen, filled = [], 0
            if total >= MOST_HELD_OUT:
                return
            chosen.append(piece)
            filled, total = filled + length, total + length
        if chosen:
            yield self.held_out.pack(chosen, tokens)

    def bigram_loss(self) -> float:
        """Nats per byte of the best guess from one byte before, counted in the training text.

        Bytes that were never seen behind another get a share as they have in the whole text.
        """
        inputs, targets, _ = self.train.pack(
            list(range(len(self.train.starts))), sum(self.train.lengths)
        )
        counts = torch.zeros(256, 256, dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        counts.index_put_((inputs[0], targets[0]), one.expand(inputs.shape[1]), accumulate=True)
        whole = counts.sum(0) + 1
        counts += whole / whole.sum()
        logs = (counts / counts.sum(1, keepdim=True)).log()
        losses = [-logs[x[0], y[0]] for x, y, _ in self.held_out_batches(MOST_HELD_OUT)]
        return torch.cat(losses).mean().item()

"""The index helpers against what their docstrings say, spelled out with Python loops."""

import re

import pytest
import torch

from fla.ops.utils import index

LENGTHS = [[5, 8], [0, 3, 0, 0, 7, 0], [1], [0], [0, 0], [64, 65, 128], []]


def cases(function):
    for argument, values in (("copy", [False, True]), ("dtype", [torch.int32, torch.int64])):
        function = pytest.mark.parametrize(argument, values, ids=str)(function)
    return pytest.mark.parametrize("lens", LENGTHS, ids=str)(function)


def boundaries(lens, dtype):
    return torch.tensor([sum(lens[:n]) for n in range(len(lens) + 1)], dtype=dtype)


def same(found, expected, dtype):
    expected = torch.tensor(expected, dtype=dtype).reshape(-1, *found.shape[1:])
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@cases
def test_of_packed_tokens(lens, dtype, copy):
    cu_seqlens = boundaries(lens, dtype)
    host = (cu_seqlens.clone(),) if copy else ()
    positions = [position for length in lens for position in range(length)]
    filled = [length for length in lens if length]
    ids = [sequence for sequence, length in enumerate(filled) for _ in range(length)]
    same(index.prepare_lens(cu_seqlens, *host), lens, dtype)
    same(index.prepare_position_ids(cu_seqlens, *host), positions, dtype)
    same(index.prepare_sequence_ids(cu_seqlens, *host), ids, torch.int64)
    tokens = index.prepare_token_indices(cu_seqlens, *host)
    assert tokens.shape == (len(positions), 2)
    same(tokens, list(zip(ids, positions, strict=True)), dtype)


@cases
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_of_chunks(lens, dtype, copy, chunk_size):
    cu_seqlens = boundaries(lens, dtype)
    host = (cu_seqlens.clone(),) if copy else ()
    chunks = [range(0, length, chunk_size) for length in lens]
    pairs = [(n, rank) for n, starts in enumerate(chunks) for rank in range(len(starts))]
    found = index.prepare_chunk_indices(cu_seqlens, chunk_size, *host)
    assert found.shape == (len(pairs), 2)
    same(found, pairs, dtype)
    offsets = [sum(map(len, chunks[:n])) for n in range(len(lens) + 1)]
    same(index.prepare_chunk_offsets(cu_seqlens, chunk_size, *host), offsets, torch.int64)


def test_a_chunk_finds_its_tokens():
    """What chunk indices are for: the chunks of all sequences tile the tokens."""
    cu_seqlens = boundaries([0, 3, 0, 9, 4], torch.int32)
    tokens = []
    for sequence, rank in index.prepare_chunk_indices(cu_seqlens, 4).tolist():
        start, stop = cu_seqlens[sequence].item(), cu_seqlens[sequence + 1].item()
        tokens += range(start + 4 * rank, min(start + 4 * rank + 4, stop))
    assert tokens == list(range(16))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_from_a_mask(dtype):
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]]).to(dtype)
    same(index.prepare_lens_from_mask(mask), [2, 0, 2], torch.int32)
    same(index.prepare_cu_seqlens_from_mask(mask), [0, 2, 2, 4], torch.int32)
    same(index.prepare_cu_seqlens_from_mask(mask, torch.int64), [0, 2, 2, 4], torch.int64)


def test_from_lengths():
    lens = torch.tensor([3, 0, 2])
    same(index.prepare_cu_seqlens_from_lens(lens), [0, 3, 3, 5], torch.int32)
    same(index.prepare_cu_seqlens_from_lens(lens, dtype=torch.int64), [0, 3, 3, 5], torch.int64)
    same(index.prepare_cu_seqlens_from_lens(lens[:0]), [0], torch.int32)


def test_a_host_copy_is_all_that_is_read():
    """Boundaries without values: any read of them would fail."""
    host = boundaries([0, 3, 7], torch.int32)
    empty = host.to("meta")
    for result in (
        index.prepare_lens(empty, host),
        index.prepare_position_ids(empty, cu_seqlens_cpu=host),
        index.prepare_sequence_ids(empty, cu_seqlens_cpu=host),
        index.prepare_token_indices(empty, cu_seqlens_cpu=host),
        index.prepare_chunk_indices(empty, 4, cu_seqlens_cpu=host),
        index.prepare_chunk_offsets(empty, 4, cu_seqlens_cpu=host),
    ):
        assert result.device.type == "meta"


BOUNDS, LENS, MASK = torch.tensor([0, 3, 7]), torch.tensor([3, 4]), torch.ones(2, 4)
BAD = [
    (ValueError, "chunk_size: expected at least 1, got 0", "chunk_offsets", (BOUNDS, 0)),
    (TypeError, "chunk_size: expected a whole number, got float", "chunk_indices", (BOUNDS, 4.0)),
    (ValueError, "cu_seqlens_cpu: expected [3], got [2]", "lens", (BOUNDS, BOUNDS[:2])),
    (TypeError, "cu_seqlens_cpu: expected a tensor, got list", "lens", (BOUNDS, [0, 3, 7])),
    (TypeError, "cu_seqlens: expected a tensor, got list", "token_indices", ([0, 3, 7],)),
    (
        TypeError,
        "cu_seqlens: expected torch.int32 or torch.int64, got torch.float32",
        "position_ids",
        (BOUNDS.float(),),
    ),
    (ValueError, "cu_seqlens: expected [N + 1], got [1, 3]", "sequence_ids", (BOUNDS[None],)),
    (ValueError, "cu_seqlens: expected [N + 1], got [0]", "lens", (BOUNDS[:0],)),
    (TypeError, "lens: expected a tensor, got list", "cu_seqlens_from_lens", ([3, 4],)),
    (ValueError, "lens: expected [N], got [1, 2]", "cu_seqlens_from_lens", (LENS[None],)),
    (TypeError, "mask: expected a tensor, got NoneType", "lens_from_mask", (None,)),
    (ValueError, "mask: expected [B, T], got [4]", "cu_seqlens_from_mask", (MASK[0],)),
]


@pytest.mark.parametrize("error, message, name, arguments", BAD, ids=[x[1] for x in BAD])
def test_bad_input(error, message, name, arguments):
    with pytest.raises(error, match=re.escape(message)):
        getattr(index, f"prepare_{name}")(*arguments)


@pytest.mark.parametrize("what", ["position_ids", "sequence_ids", "token_indices"])
def test_boundaries_that_decrease(what):
    with pytest.raises(ValueError, match="cu_seqlens: expected not to decrease"):
        getattr(index, f"prepare_{what}")(torch.tensor([0, 3, 1]))

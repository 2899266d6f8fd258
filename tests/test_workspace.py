"""Workspaces lie side by side in one tensor, and are what launches take for tensors."""

from __future__ import annotations

import torch

from fla.ops.common.workspace import as_tensor, bytes_of, new_parts, parts_of, room_of

WANTED = (torch.bfloat16, 2, 3, 5), (torch.float32, 0, 7), (torch.float32, 7), (torch.int32, 2, 2)


def test_no_two_overlap():
    parts = new_parts(torch.zeros(1), *WANTED)
    for i, part in enumerate(parts):
        part.tensor().fill_(i)
    for i, (part, (dtype, *shape)) in enumerate(zip(parts, WANTED, strict=True)):
        x = part.tensor()
        assert x.dtype == part.dtype == dtype
        assert x.shape == part.shape == tuple(shape)
        assert x.eq(i).all()
        assert not (part.data_ptr() - parts[0].data_ptr()) % 128


def test_rooms_fit():
    room = room_of(torch.zeros(1), bytes_of(*WANTED))
    *_, last = parts_of(room, *WANTED)
    last.tensor()[:] = 1  # past its end, this would be an error
    assert room.numel() == 4 * 128 - 128


def test_rows_and_views():
    part, _ = new_parts(torch.zeros(1), *WANTED[:2])
    part.tensor().copy_(torch.arange(30).view(2, 3, 5))
    assert part[1].tensor().equal(part.tensor()[1])
    assert part.view(10, 3).tensor().equal(part.tensor().view(10, 3))
    assert part[1].data_ptr() == part.tensor()[1].data_ptr()
    assert part[1].get_device() == part.tensor().get_device()


def test_what_is_no_part_is_left_alone():
    x = torch.zeros(1)
    assert as_tensor(x) is x
    assert as_tensor(None) is None

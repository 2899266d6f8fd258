"""``Cache``: what the layers of a model carry from one call to the next."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fla.ops.common import contract

State = dict[str, Any]
KINDS = ("recurrent_state", "conv_state", "attn_state", "attn_mask")


class Cache:
    """States layer by layer, each with the number of tokens that the layer has seen.

    A layer's state is a dictionary of ``recurrent_state``, a tensor or a tuple of them;
    ``conv_state``, the last inputs of each convolution; and ``attn_state``, keys, values and what
    else is kept for every token, ``[N, T, ...]`` each, beside ``attn_mask`` ``[N, T]``, which says
    where tokens are if some are padding.  What is not there is missing.
    """

    is_compileable = False  # asked by Hugging Face's generate: shapes may grow

    def __init__(self) -> None:
        self._states: dict[int, State] = {}
        self._seen: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, layer_idx: int) -> bool:
        return layer_idx in self._states

    def __getitem__(self, layer_idx: int) -> State:
        if layer_idx not in self._states:
            raise KeyError(f"layer {layer_idx} has no state here, layers {list(self)} have one")
        return self._states[layer_idx]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._states))

    def __repr__(self) -> str:
        return f"Cache(layers={list(self)}, tokens={self.get_seq_length()})"

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """How many tokens a layer has seen, padding included; by default the first layer."""
        if layer_idx is None:
            layer_idx = next(iter(self), 0)
        return self._seen.get(layer_idx, 0)

    def update(
        self,
        recurrent_state: Any = None,
        attn_state: tuple[Tensor, ...] | None = None,
        conv_state: Any = None,
        attn_mask: Tensor | None = None,
        layer_idx: int = 0,
        offset: int = 1,
        window_size: int | None = None,
    ) -> State:
        """Store a layer's states after ``offset`` more tokens, and return all it has now.

        What is not given stays.  Recurrent and convolution states replace the old ones;
        ``attn_state`` and ``attn_mask`` are those of the new tokens and come behind the old, which
        take their dtypes.  What is returned holds all of them, while of tokens without padding only
        the last ``window_size`` stay.
        """
        state = dict(self._states.get(layer_idx, {}))
        if recurrent_state is not None:
            state["recurrent_state"] = recurrent_state
        if conv_state is not None:
            state["conv_state"] = conv_state
        whole = state
        if attn_state is not None:
            whole = state | _behind(state, attn_state, attn_mask)
            state = whole if "attn_mask" in whole else whole | _last(whole, window_size)
        self._states[layer_idx] = state
        self._seen[layer_idx] = self._seen.get(layer_idx, 0) + offset
        return whole

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was, ``[N]``; rows may repeat or be left out."""
        if not isinstance(beam_idx, Tensor):
            raise TypeError(f"beam_idx: expected a tensor, got {type(beam_idx).__name__}")
        if beam_idx.dim() != 1:
            raise ValueError(f"beam_idx: expected [N], got {list(beam_idx.shape)}")
        if beam_idx.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"beam_idx: expected int32 or int64, got {beam_idx.dtype}")

        known = beam_idx.tolist() if beam_idx.is_cpu else []  # a device is not asked

        def chosen(x: Tensor) -> Tensor:
            rows = x.shape[0]
            if not all(0 <= i < rows for i in known):
                raise ValueError(f"beam_idx: expected rows from 0 to {rows - 1}, got {known}")
            return x.index_select(0, beam_idx.to(x.device))

        self._states = {i: _map(state, chosen) for i, state in self._states.items()}

    def crop(self, max_length: int) -> None:
        """Forget all but the first ``max_length`` tokens; a negative number is what to forget.

        Keys and values can be forgotten.  A recurrent state, and the tokens that a window has left
        behind, cannot be brought back: that is an error, and nothing changes.
        """
        max_length = contract.whole_number("max_length", max_length)
        lengths = {layer_idx: self._kept(layer_idx, max_length) for layer_idx in self}
        for layer_idx, (length, forgotten) in lengths.items():
            if forgotten:
                state = self._states[layer_idx]
                stop = state["attn_state"][0].shape[1] - forgotten
                self._states[layer_idx] = _map(state, functools.partial(_apart, stop=stop))
                self._seen[layer_idx] = length

    def _kept(self, layer_idx: int, max_length: int) -> tuple[int, int]:
        """How many tokens of a layer stay and how many go, or why that cannot be."""
        seen, state = self._seen[layer_idx], self._states[layer_idx]
        length = max(seen + max_length, 0) if max_length < 0 else min(max_length, seen)
        if length == seen:
            return seen, 0
        if "attn_state" not in state or "recurrent_state" in state:
            raise ValueError(
                f"max_length: expected at least {seen}, the tokens seen, for layer {layer_idx} "
                f"holds a recurrent state, got {max_length}"
            )
        if state["attn_state"][0].shape[1] < seen:
            raise ValueError(
                f"max_length: expected at least {seen}, the tokens seen, for the window of layer "
                f"{layer_idx} has left some behind, got {max_length}"
            )
        return length, seen - length

    def state_dict(self) -> dict[str, Any]:
        """All states as plain dictionaries and tensors, for ``torch.save``."""
        return {
            "layers": {
                layer_idx: {"seen": self._seen[layer_idx], **self._states[layer_idx]}
                for layer_idx in self
            }
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of ``state_dict`` in place of those here, on their devices."""
        layers = state_dict.get("layers") if isinstance(state_dict, dict) else None
        if (
            not isinstance(layers, dict)
            or len(state_dict) != 1
            or not all(isinstance(layer_idx, int) for layer_idx in layers)
            or not all(isinstance(state, dict) for state in layers.values())
        ):
            raise ValueError(
                "state_dict: expected what Cache.state_dict returned, got something else"
            )
        for layer_idx, state in layers.items():
            unknown = set(state) - {"seen", *KINDS}
            if "seen" not in state or unknown:
                raise ValueError(
                    f"state_dict: expected seen and some of {', '.join(KINDS)} for layer "
                    f"{layer_idx}, got {', '.join(sorted(state))}"
                )
        self._seen = {layer_idx: state["seen"] for layer_idx, state in layers.items()}
        self._states = {
            layer_idx: {kind: state[kind] for kind in KINDS if kind in state}
            for layer_idx, state in layers.items()
        }


def _behind(old: State, attn_state: tuple[Tensor, ...], attn_mask: Tensor | None) -> State:
    """Old tokens and new ones, in the dtypes of the new; a mask only if either has padding."""
    past = old.get("attn_state")
    if past is None:
        new: State = {"attn_state": attn_state}
        return new if attn_mask is None else new | {"attn_mask": attn_mask}
    joined: State = {
        "attn_state": tuple(
            torch.cat([seen.to(new.dtype), new], 1)
            for seen, new in zip(past, attn_state, strict=True)
        )
    }
    masks = old.get("attn_mask"), attn_mask
    if masks == (None, None):
        return joined
    tokens = past[0], attn_state[0]
    filled = [
        x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        for mask, x in zip(masks, tokens, strict=True)
    ]
    return joined | {"attn_mask": torch.cat(filled, 1)}


def _last(state: State, window_size: int | None) -> State:
    """The last tokens."""
    attn_state = state["attn_state"]
    if window_size is None or attn_state[0].shape[1] <= window_size:
        return state
    return {"attn_state": tuple(_apart(x, start=x.shape[1] - window_size) for x in attn_state)}


def _apart(x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Tokens [start, stop) in memory of their own: a part would keep the whole alive."""
    return x[:, start:stop].clone(memory_format=torch.contiguous_format)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map(each, change) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_map(each, change) for each in value)
    return value

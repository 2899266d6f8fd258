"""``Mixer``: what all layers do alike, around the mixing of tokens itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fla.layers.cache import Cache, State
from fla.layers.tokens import Tokens
from fla.ops.common import contract

# Up to so many tokens outside of training take the recurrent form.
MOST_RECURRENT = 64


class Call:
    """One call of a layer: where its tokens are, the state before them, and who keeps the next."""

    def __init__(self, layer: Mixer, tokens: Tokens, cache: Cache | None):
        self.tokens, self._cache = tokens, cache
        self._layer_idx = layer.layer_idx or 0  # never None where there is a cache
        self.keeps = cache is not None
        self.state: State = {}
        self.seen = 0  # tokens before these, padding included
        if cache is not None:
            _check_in_step(cache, self._layer_idx, tokens.columns)
            self.seen = cache.get_seq_length(self._layer_idx)
            if self._layer_idx in cache:
                self.state = cache[self._layer_idx]
                _check_state(layer, self.state, tokens.N)

    @property
    def cu_seqlens(self) -> Tensor | None:
        return self.tokens.cu_seqlens

    def past_tokens(self) -> int | Tensor:
        """How many tokens came before, of each sequence [N] if some rows had padding."""
        mask = self.state.get("attn_mask")
        return self.seen if mask is None else self.seen - mask.shape[1] + mask.sum(1)

    def keep(self, **states: Any) -> State:
        """Hand the states after this call to the cache, if there is one; all that is there now."""
        if self._cache is None:
            return {}
        return self._cache.update(**states, layer_idx=self._layer_idx, offset=self.tokens.columns)


class Mixer(nn.Module):
    """A layer that mixes tokens: hidden states in, hidden states of the same shape out.

    A layer defines ``mix``, which gets tokens without padding, and ``state_shapes``.
    """

    def __init__(self, hidden_size: int, layer_idx: int | None):
        super().__init__()
        self.hidden_size = contract.whole_number("hidden_size", hidden_size)
        if hidden_size < 1:
            raise ValueError(f"hidden_size: expected at least 1, got {hidden_size}")
        self.layer_idx = layer_idx
        if layer_idx is not None:
            self.layer_idx = contract.whole_number("layer_idx", layer_idx)

    def mix(self, x: Tensor, call: Call) -> Tensor:
        """Outputs for the tokens x ``[B, T, D]``, or packed ``[1, T, D]``."""
        raise NotImplementedError

    def state_shapes(self, N: int) -> dict[str, tuple[tuple[int | None, ...], ...]]:
        """The shapes of this layer's state for N sequences; None where any size will do."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Cache | None]:
        """Mix the tokens of a batch, or the next tokens of one.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            attention_mask: 1 where a token is and 0 where padding is, left or right, ``[B, T]``, or
                with the tokens seen before in front ``[B, seen + T]``.  Outputs at padding are 0.
            past_key_values: the cache that holds what came before; it is updated.
            use_cache: whether to begin a cache where none is given.
            kwargs: ``cu_seqlens`` ``[N + 1]``, the boundaries of sequences packed into a batch of
                one; ``output_attentions``, which must be false.

        Returns:
            Outputs ``[B, T, hidden_size]``, None, and the cache or None.
        """
        cu_seqlens = _options(type(self).__name__, kwargs)
        self._check(hidden_states)
        cache = self._cache(past_key_values, use_cache)
        if past_key_values is not None and torch.is_grad_enabled():
            first_time = _first_time_compiled if is_compiling() else _first_time
            hidden_states = first_time(hidden_states)
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        tokens = Tokens(hidden_states, attention_mask, cu_seqlens, seen)
        o = self.mix(tokens.pack(hidden_states), Call(self, tokens, cache))
        return tokens.unpack(o), None, cache

    def recurrent(self, x: Tensor) -> bool:
        """Whether tokens x take the recurrent form in place of the chunked one."""
        few = x.shape[1] <= MOST_RECURRENT
        if is_compiling():  # a graph of all lengths has the form for all
            from torch.fx.experimental.symbolic_shapes import statically_known_true

            few = statically_known_true(few)
        return not self.training and few

    def _check(self, hidden_states: Tensor) -> None:
        if not isinstance(hidden_states, Tensor):
            raise TypeError(f"hidden_states: expected a tensor, got {type(hidden_states).__name__}")
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(
                f"hidden_states: expected [B, T, {self.hidden_size}], "
                f"got {list(hidden_states.shape)}"
            )

    def _cache(self, past: Cache | None, use_cache: bool) -> Cache | None:
        if past is None and not use_cache:
            return None
        if self.layer_idx is None:
            raise ValueError(
                f"layer_idx: expected a number for a {type(self).__name__} with a cache, got None"
            )
        if past is None:
            return Cache()
        if not isinstance(past, Cache):
            raise TypeError(
                f"past_key_values: expected a fla.layers.Cache, got {type(past).__name__}"
            )
        return past


def _first_time(x: Tensor) -> Tensor:
    """x, of a call that goes on from a cache; a second time it would go on from its own end."""
    if torch._C._current_graph_task_id() >= 0:
        raise RuntimeError(
            "past_key_values: expected None where a backward pass computes tokens again "
            "(activation checkpointing), got a Cache, which has them already"
        )
    return x


@torch.library.custom_op("fla::first_time", mutates_args=(), schema="(Tensor x) -> Tensor")
def _first_time_compiled(x):
    """The same where it has to be asked when compiled code runs; operators return new tensors."""
    return _first_time(x).clone()


_first_time_compiled.register_fake(torch.empty_like)
_first_time_compiled.register_autograd(lambda ctx, dx: dx)


def multiple(name: str, value: int, of: str, divisor: int) -> None:
    """Sizes of heads: ``value`` must be a multiple of ``divisor``."""
    value, divisor = contract.whole_number(name, value), contract.whole_number(of, divisor)
    if divisor <= 0 or value <= 0 or value % divisor:
        raise ValueError(f"{name}: expected a multiple of {of} = {divisor}, got {value}")


def channels(of: str, size: int, by: str, factor: float) -> int:
    """``size * factor`` channels; the factor need not be a whole number."""
    product = contract.whole_number(of, size) * contract.number(by, factor)
    whole = round(product)
    if whole < 1 or abs(product - whole) > 1e-6 * whole:
        raise ValueError(f"{of} * {by}: expected a whole number of channels, got {product:g}")
    return whole


def fits(name: str, size: int, limit: int) -> None:
    """A head may have so many channels."""
    if not 1 <= size <= limit:
        raise ValueError(f"{name}: expected a head of 1 to {limit} channels, got {size}")


def _options(layer: str, kwargs: dict[str, Any]) -> Tensor | None:
    """``cu_seqlens`` from the keywords of a call."""
    known = {"cu_seqlens", "output_attentions"}
    for name in kwargs:
        if name not in known:
            raise TypeError(f"{name}: {layer} has no such argument")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False, these layers have no map of weights")
    return kwargs.get("cu_seqlens")


def _check_in_step(cache: Cache, layer_idx: int, columns: int) -> None:
    """All layers of a model have seen the same tokens, those before this one the new ones too.

    Each call compares its layer with the first and the last; between them they meet all.
    """
    seen = cache.get_seq_length(layer_idx)
    layers = list(cache)
    for other in layers[:1] + layers[-1:]:
        expected = seen + columns if other < layer_idx else seen
        if cache.get_seq_length(other) != expected:
            raise ValueError(
                f"past_key_values: expected {expected} tokens seen by layer {other}, beside {seen} "
                f"by layer {layer_idx}, got {cache.get_seq_length(other)}; "
                f"a cache is of one model and grows layer by layer, before layer {layer_idx} by "
                f"these {columns} tokens already"
            )


def _check_state(layer: Mixer, state: State, N: int) -> None:
    """The state must be one of this kind of layer, of its sizes and of this batch."""
    expected = layer.state_shapes(N)
    found = {kind: each for kind, each in state.items() if kind != "attn_mask"}
    name = f"past_key_values: expected layer {layer.layer_idx}'s"
    if found.keys() != expected.keys():
        raise ValueError(f"{name} {' and '.join(expected)}, got {' and '.join(found)}")
    for kind, shapes in expected.items():
        tensors = found[kind] if isinstance(found[kind], tuple | list) else (found[kind],)
        got = [tuple(tensor.shape) for tensor in tensors]
        if len(got) != len(shapes) or not all(map(_fits, got, shapes)):
            raise ValueError(
                f"{name} {kind} for {N} sequences to be {_listed(shapes)}, got {_listed(got)}"
            )


def _fits(found: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(found) == len(expected) and all(
        b in (None, a) for a, b in zip(found, expected, strict=True)
    )


def _listed(shapes: Any) -> str:
    sizes = [["T" if size is None else str(size) for size in shape] for shape in shapes]
    return " and ".join(f"[{', '.join(each)}]" for each in sizes)

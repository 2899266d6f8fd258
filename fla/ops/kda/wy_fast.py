"""The triangular system of a chunk: corrected values v' solve (I + β A) v' = β (v − (D_i0 k_i)ᵀS).

Only the inverse X = (I + β A)⁻¹ is needed; the products U = X β v and W = X β (D_i0 k) of the WY
form are not, for the state is applied before X is: v' = X β (v − (D_i0 k)S).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fla.ops.kda.halving import level_mask


@triton.jit
def unit_lower_inverse(
    b_l, C: tl.constexpr, LEVELS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """(I + L)⁻¹ for L [C, C], strictly lower, in fp32; operands of products in DTYPE.

    The inverse X of the blocks of s on the diagonal grows to those of 2s: with L_s the pairs whose
    row lies in the second half and whose column in the first half of such a block,

        X ← X − X L_s X

    which is X − L_1 for s = 1.
    """
    o_c = tl.arange(0, C)
    b_x = tl.where(o_c[:, None] == o_c[None, :], 1.0, 0.0)  # [C, C]
    b_x -= tl.where(level_mask(0, C), b_l, 0.0)
    for level in range(1, LEVELS):
        b_pairs = tl.where(level_mask(level, C), b_l, 0.0)
        b_y = tl.dot(b_pairs.to(DTYPE), b_x.to(DTYPE), input_precision=PRECISION)
        b_x -= tl.dot(b_x.to(DTYPE), b_y.to(DTYPE), input_precision=PRECISION)
    return b_x

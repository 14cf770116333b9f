"""What the ways to a norm cost, estimated from shapes: multiply-adds for one record and one block of the weight.

The constants hold within a factor of two on the processors they were measured on. They decide how fast an answer comes,
never what it is: every way gives the same number.
"""

from __future__ import annotations

STORE = 30
"""What writing an element of a per-sample gradient and reading it back costs, in multiply-adds."""

UNFOLD = 20
"""What copying an element of a convolution's windows costs, in multiply-adds."""


def gram(t: int, i: int, o: int) -> int:
    """Both Gram matrices, [t, t]; of the blocks beside the diagonal only one of each pair (`matmul.GRAM_BLOCK`)."""
    return t * t * (i + o)


def per_sample(t: int, i: int, o: int) -> int:
    """A per-sample gradient [o, i] as a sum over t, stored."""
    return t * i * o + STORE * i * o


def windows(t: int, i: int) -> int:
    """The windows of a convolution, [t, i]."""
    return UNFOLD * t * i

"""What is known of one forward pass of the root module until its backward has been answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ghostgrad.recording.padding_proof import Own


class Delivery(NamedTuple):
    """What the private loader had handed out when the forward ran."""

    piece: int
    records: int
    logical_batch: int
    last: bool
    epoch: int


@dataclass(eq=False)
class Tape:
    """One forward pass of the root module, as its probes know it. It holds nothing of the graph that holds the probes.

    Attributes:
        n: the records in it.
        width: the rows that run as records: those, or one of zeros where ranks go through their layers in step.
        delivery: which batch of the private loader it belongs to; None without such a loader.
        rows: the first of the root's inputs that holds the records, to compare forwards that are joined in one backward.
        padded: how far the root's outputs for some records go without padding; None where it was not shown that no output depends
            on that.
        inputs: the root's inputs that require grad, and the leaves that stood in for them inside.
        calls: how many probes of each parameter have not fired yet.
        packed: whether the graph does not hold all of the calls' inputs as they are (checkpointed, off-loaded).
        unproved: the layouts of calls that row isolation was not shown for yet.
        isolate: whether some rank has to show row isolation in the backward.
        read: whether the loss whose backward is under way was read down to here.
        done: whether its backward ran; it can run once.
        rerun: whether parts of the forward were run again in it (checkpointing, reversible layers).
    """

    n: int
    delivery: Delivery | None
    width: int = field(default=-1)
    rows: Tensor | None = None
    padded: tuple[Own, ...] | None = None
    inputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    calls: Counter[nn.Parameter] = field(default_factory=Counter)
    packed: bool = False
    unproved: set[Any] = field(default_factory=set)
    isolate: bool = False
    read: bool = False
    done: bool = False
    rerun: bool = False

    def __post_init__(self) -> None:
        if self.width < 0:
            self.width = self.n


@dataclass
class Recording:
    """A tape with the graph it was recorded on; held by the boundary, so it goes when the user lets go of the outputs.

    Attributes:
        tape: what the probes know.
        outputs: outlines of the root's outputs inside the graph, before the boundary.
        places: which of its floating-point outputs these are.
        grads: the gradients that arrived at them, scaled to be those of each record's own loss.
    """

    tape: Tape
    outputs: list[Tensor]
    places: list[int]
    grads: list[Tensor | None] = field(default_factory=list)

"""What the recorder hands the uses of weights to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from ghostgrad.distributed import Unit
from ghostgrad.gradients import Use
from ghostgrad.recording.tape import Tape
from ghostgrad.recording.weighing import Footprint


class Sink(Protocol):
    """What the recorder needs of a clipper."""

    @property
    def passes_twice(self) -> bool:
        """Whether a second backward has to follow the one that was settled."""

    @property
    def postponed(self) -> Sequence[nn.Parameter]:
        """The weights that it is for."""

    def wants(self, parameter: nn.Parameter) -> bool:
        """Whether the second backward is for this weight."""

    def admit(self, tapes: Sequence[Tape]) -> None:
        """Refuse records that must not be added to this step; called before any sum is touched."""

    def note_pass(self) -> None:
        """A gradient went through the graph that is not recorded (`torch.autograd.grad` of the inputs)."""

    def weigh(self, weighed: Callable[[], Footprint | None]) -> None:
        """Where it matters, ask what the graph holds of a record, and what would be kept in its place."""

    def begin(self, n: int, *, packed: bool) -> bool:
        """A backward of n records begins; returns whether its graph has to stay for a second one.

        ``packed`` says that it does not hold all of the layers' inputs as they are.
        """

    def measure(
        self, parameter: nn.Parameter, use: Use, *, complete: bool, held: Callable[[], Sequence[Tensor]]
    ) -> tuple[str, str]:
        """Take note of a use; the route of its norm, and what is kept.

        ``complete`` says that no other use of the weight can follow, ``held`` what of it the graph keeps anyway.
        """

    def settle(self, n: int, unit: float) -> None:
        """All uses are known: work out the factors, and the sums of what was kept.

        A record's gradient is ``unit`` times what was measured. With no records, in step with ranks that have some.
        """

    def add(self, parameter: nn.Parameter, use: Use) -> None:
        """Second pass: add a use, weighted by the factors."""

    def hand_over(self, unit: Unit) -> None:
        """Second pass: the backward has gone through a unit of split parameters, on all ranks."""

    def commit(self, tapes: Sequence[Tape]) -> None:
        """Add the sums of this backward to those of the step; refuse a second one that was not the first again."""

    def reset(self) -> None:
        """Forget the backward that is under way."""

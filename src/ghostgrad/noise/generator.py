"""Gaussian noise from a torch generator that the user brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ghostgrad.errors import ConfigurationError
from ghostgrad.noise.mechanism import check_request
from ghostgrad.random_states import from_text, to_text


class GeneratorGaussian:
    """``N(0, std^2)`` from a ``torch.Generator``, in the order of the calls.

    For users who pass their own ``noise_generator``. Unlike :class:`ghostgrad.noise.KeyedGaussian` the values depend
    on all draws before, so a resumed run must restore the generator's state, and slices cannot be drawn alone.

    Formal guarantee: as for ``KeyedGaussian``, as long as nobody else knows the generator's seed or state.

    >>> first, again = torch.zeros(3), torch.zeros(3)
    >>> GeneratorGaussian(torch.Generator().manual_seed(0)).add_(first, std=1.0, step=0, index=0)
    >>> GeneratorGaussian(torch.Generator().manual_seed(0)).add_(again, std=1.0, step=9, index=9)
    >>> torch.equal(first, again)
    True
    """

    name: str

    def __init__(self, generator: torch.Generator) -> None:
        if not isinstance(generator, torch.Generator):
            raise ConfigurationError(
                f"generator={generator!r} is no torch.Generator; pass torch.Generator(), or leave it out for keyed "
                "noise."
            )
        self._generator = generator
        self.name = f"Gaussian (torch generator on {generator.device})"

    @property
    def state(self) -> bytes:
        """The generator's state: ranks that draw the same noise have the same."""
        return self._generator.get_state().numpy().tobytes()

    def add_(self, tensor: torch.Tensor, *, std: float, step: int, index: int, offset: int = 0) -> None:
        """Add noise to ``tensor`` (float32 or float64) in place; ``step`` and ``index`` do not change what is drawn.

        Raises:
            ConfigurationError: negative or non-finite ``std``, another dtype, or ``offset`` other than 0.
        """
        check_request([(offset, tensor)], std=std, step=step, index=index)
        if offset:
            raise ConfigurationError(
                f"offset={offset}: a torch generator draws in order and cannot draw one slice of a parameter alone; "
                "leave noise_generator out (noise is then keyed) where a parameter is drawn in shares."
            )
        self._add(tensor, std)

    def add_all_(self, parts: Sequence[tuple[int, torch.Tensor]], *, std: float, step: int) -> None:
        """The same for the tensors of ``(offset, tensor)``, in their order, wherever they are."""
        check_request(parts, std=std, step=step)
        for _, tensor in parts:
            self._add(tensor, std)

    @torch.no_grad()
    def _add(self, tensor: torch.Tensor, std: float) -> None:
        if std == 0:
            return
        device = self._generator.device
        noise = torch.randn(tensor.shape, generator=self._generator, device=device, dtype=tensor.dtype)
        tensor.add_(noise.to(tensor.device), alpha=std)

    def follow(self, facts: str) -> None:
        """Nothing: what is drawn depends on the draws before alone."""

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator, in hexadecimal."""
        return {"generator": to_text(self._generator.get_state())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the generator where it was."""
        self._generator.set_state(from_text(state["generator"], self._generator.device))

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise what `load_state_dict` would raise, and change nothing."""
        from_text(state["generator"], self._generator.device)

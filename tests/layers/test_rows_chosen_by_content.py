"""Tokens sent to experts: how many rows an expert sees depends on what is in the records. Exact in every batch, or refused.

A number of rows that happens to be whole for each record says nothing about whose they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from private_step import MODES, read
from single_record import assert_same_gradients, expected_gradient, gradients_of_each_record
from torch import Tensor, nn

from ghostgrad import GhostgradError, PrivacyEngine
from ghostgrad.recording.places import Known, Observed

TOKENS, WIDTH, BOUND = 3, 4, 1.0


class Experts(nn.Module):
    """Each token, [n, 3, 4], goes to the expert with the highest score, and its rows are scattered back."""

    def __init__(self, *, only_first: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 5), nn.GELU(), nn.Linear(5, WIDTH)) for _ in range(3)
        )
        self.only_first = only_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mine = (torch.full_like(chosen, 0) if self.only_first else chosen) == number
            if mine.any():
                out[mine] = weights[mine, None] * expert(tokens[mine])
        return out.view_as(x)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    uneven = torch.arange(TOKENS * WIDTH, dtype=x.dtype).cos().view(TOKENS, WIDTH)
    return (model(x).square() * uneven).sum((1, 2))


def steps(model: Experts, mode: str, sizes: Iterable[int], then: bool = False) -> list[str]:
    """For each batch "exact", or why it was refused; ``then`` lets the tokens go everywhere after the first batch."""
    truth = Experts().double()
    truth.load_state_dict(model.state_dict())
    truth.only_first = model.only_first
    private, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=None, sample_rate=0.5,
        expected_batch_size=8, noise_multiplier=0.0, max_grad_norm=BOUND, grad_sample_mode=mode,
    )  # fmt: skip
    found = []
    for size in sizes:
        x = torch.randn(size, TOKENS, WIDTH, dtype=torch.float64)
        try:
            losses(private, x).mean().backward()
        except GhostgradError as error:
            found.append(str(error))
        else:
            optimizer.step()
            each = gradients_of_each_record(truth, losses, [x])
            assert_same_gradients(read(private), expected_gradient(each, BOUND, expected_batch_size=8), relative=1e-9)
            found.append("exact")
        optimizer.zero_grad()
        if then:
            model.only_first = truth.only_first = False
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", MODES)
def test_experts_are_answered_for_by_the_module_that_sends_tokens_to_them(mode: str, seed: int) -> None:
    torch.manual_seed(seed)
    sizes = [4, 2, 3, 2, 2, 3, 1, 2, 5]
    assert steps(Experts().double(), mode, sizes) == ["exact"] * len(sizes)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", MODES)
def test_experts_that_the_first_batch_did_not_show_are_never_misread(mode: str, seed: int) -> None:
    """All tokens of the first batch go to one expert; its rows are whole for each record, and those of the others unseen."""
    torch.manual_seed(seed)
    found = steps(Experts(only_first=True).double(), mode, [4, 2, 2, 2, 2, 2, 2, 1, 2], then=True)
    assert found[0] == "exact"
    assert all("experts" in answer for answer in found if answer != "exact")


def test_what_grows_by_itself_is_told_from_what_grows_with_the_batch() -> None:
    found = {}
    for name, small, large in (("with", 6, 8), ("by itself", 6, 7), ("not", 6, 6)):
        known, observed = Known(), Observed()
        observed.note("layer", 4, [torch.ones(large, 2)], [torch.ones(large, 2)])
        observed.teach(known, "layer", 3, [torch.ones(small, 2)], [torch.ones(small, 2)])
        found[name] = (bool(known.by_content), known.of("layer", [torch.ones(9, 2)], [torch.ones(9, 2)])[1])
        assert not known.of("another", [torch.ones(9, 2)], [torch.ones(9, 2)])[1]
    assert found == {"with": (False, True), "by itself": (True, False), "not": (False, True)}

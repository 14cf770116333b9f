"""Weights that are worked out from other parameters in every forward: both of torch's ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from leave_one_out import MODES, C
from torch import Tensor, nn
from torch.nn import utils

from ghostgrad import PrivacyEngine, UnsupportedModuleError

ROWS = 5
BY_PARAMETRIZATION = {
    "weight norm": utils.parametrizations.weight_norm,
    "spectral norm": utils.parametrizations.spectral_norm,
    "orthogonal": utils.parametrizations.orthogonal,
}


def by_hooks(layer: nn.Module) -> nn.Module:
    return utils.weight_norm(layer)


def linear(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(6, 4)), nn.ReLU(), nn.Linear(4, 3)).double()


def convolution(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (2, 3)), wrap(nn.Conv1d(2, 4, 2)), nn.Flatten(), nn.Linear(8, 3)).double()


def released(build: Callable[[], nn.Module], mode: str, rows: list[int], bound: float) -> Tensor:
    """The clipped sum of some rows; the model is built anew, because one with hooks of the old kind cannot be copied."""
    torch.manual_seed(0)
    model = build()
    x, y = torch.randn(ROWS, 6, dtype=torch.float64)[rows], torch.randint(3, (ROWS,))[rows]
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=1.0, noise_multiplier=0.0, max_grad_norm=bound, grad_sample_mode=mode,
    )  # fmt: skip
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def plain_gradient(build: Callable[[], nn.Module]) -> Tensor:
    torch.manual_seed(0)
    model = build()
    x, y = torch.randn(ROWS, 6, dtype=torch.float64), torch.randint(3, (ROWS,))
    F.cross_entropy(model(x), y, reduction="sum").backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [linear, convolution])
@pytest.mark.parametrize("name", [*BY_PARAMETRIZATION, "weight norm by hooks"])
def test_they_are_trained_like_the_loop_over_records(name: str, build: Callable[..., nn.Module], mode: str) -> None:
    wrap = BY_PARAMETRIZATION.get(name, by_hooks)

    def built() -> nn.Module:
        return build(wrap)

    plain = plain_gradient(built)
    torch.testing.assert_close(released(built, mode, list(range(ROWS)), 1e6), plain, rtol=1e-9, atol=1e-9)
    alone = [released(built, mode, [row], C) for row in range(ROWS)]
    assert max(float(part.norm()) for part in alone) <= C * (1 + 1e-6)
    torch.testing.assert_close(released(built, mode, list(range(ROWS)), C), sum(alone), rtol=1e-9, atol=1e-9)


def test_a_weight_that_is_normed_anew_by_every_forward_is_refused_with_the_way_out() -> None:
    """The old spectral_norm moves its estimate on in a hook, outside of the module: each forward has another weight."""
    with pytest.raises(UnsupportedModuleError, match=r"parametrizations\.spectral_norm"):
        released(lambda: linear(utils.spectral_norm), "bk", [0, 1], C)

"""What ranks must have in common is compared once, in `make_private`; every rank raises and none waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import ConfigurationError, PrivacyEngine


def make(rank: int, **different: Any) -> str | None:
    """What `make_private` says on this rank; rank 1 does something else than rank 0."""
    mine = different if rank else {}
    torch.manual_seed(0)
    module = mine.get("module") or nn.Linear(3, 2)
    if mine.get("moved"):
        with torch.no_grad():
            module.weight[0, 0] += 1e-3
    optimizer = mine.get("optimizer", torch.optim.SGD)(module.parameters(), lr=mine.get("lr", 0.1))
    records = TensorDataset(torch.zeros(mine.get("records", 20), 3))
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **mine.get("options", {})}
    before = dict(vars(module))
    try:
        PrivacyEngine(seed=mine.get("seed", 0)).make_private(
            module=module, optimizer=optimizer, data_loader=DataLoader(records, batch_size=4), **options
        )
    except ConfigurationError as error:
        assert dict(vars(module)) == before
        assert not module._forward_hooks
        assert "step" not in vars(optimizer)
        return str(error)
    return None


@pytest.mark.parametrize(
    ("different", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"seed": None}, "seed"),
        ({"records": 24}, "number of records"),
        ({"lr": 0.2}, "an option or a parameter of the optimizer"),
        ({"optimizer": torch.optim.Adam}, "type of the optimizer"),
        ({"moved": True}, "the parameter or buffer weight"),
        ({"module": nn.Linear(3, 2, bias=False)}, "a parameter of the optimizer"),
        ({"options": {"noise_multiplier": 1.1}}, "noise_multiplier"),
        ({"options": {"max_grad_norm": 2.0}}, "max_grad_norm"),
        ({"options": {"clipping": "automatic"}}, "clipping"),
        ({"options": {"loss_reduction": "sum"}}, "loss_reduction"),
        ({"options": {"accumulation_steps": 2}}, "differs"),
        ({"options": {"expected_batch_size": 5.0}}, "expected_batch_size"),
        ({"options": {"noise_generator": torch.Generator().manual_seed(0)}}, "source of the noise"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_rank_raises_and_names_what_differs(different: dict[str, Any], named: str) -> None:
    for said in on_ranks(2, lambda rank: make(rank, **different)):
        assert said is not None
        assert named in said
        assert "ranks 0 and 1" in said


def test_equal_ranks_agree() -> None:
    assert on_ranks(3, make) == [None, None, None]


def test_they_are_compared_in_one_exchange_after_they_have_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)
        return lambda *arguments, **options: (calls.append(name), original(*arguments, **options))[1]

    for name in (
        "all_gather_object",
        "broadcast_object_list",
        "gather_object",
        "all_gather",
        "all_reduce",
        "broadcast",
    ):
        monkeypatch.setattr(dist, name, counted(name))

    def run(rank: int) -> tuple[str | None, list[str]]:
        return make(rank), calls

    # The key, then the name of the run and the facts of model, data, plan and layout.
    expected = ["broadcast_object_list", "all_gather_object", "all_gather_object"]
    assert on_ranks(2, run) == [(None, expected)] * 2


def test_a_rank_that_fails_its_own_checks_takes_the_others_with_it() -> None:
    alone, other = on_ranks(2, lambda rank: make(rank, options={"noise_multiplier": -1.0}))[::-1]
    assert "noise_multiplier=-1.0" in alone
    assert "rank 1 could not go on" in other
    assert "noise_multiplier=-1.0" in other


def test_generators_must_be_in_the_same_state() -> None:
    def run(rank: int) -> str | None:
        generator = torch.Generator().manual_seed(rank)
        options = {"noise_generator": generator}
        module = nn.Linear(3, 2)
        torch.manual_seed(0)
        nn.init.ones_(module.weight)
        nn.init.ones_(module.bias)
        try:
            PrivacyEngine(seed=0).make_private(
                module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0,
                data_loader=DataLoader(TensorDataset(torch.zeros(20, 3)), batch_size=4), max_grad_norm=1.0, **options,
            )  # fmt: skip
        except ConfigurationError as error:
            return str(error)
        return None

    assert all("noise_generator differs" in said for said in on_ranks(2, run))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"poisson_sampling": False}, "several ranks"),
        ({"data_loader": None, "sample_rate": 0.1, "expected_batch_size": 4.0}, "data_loader=None on 2 ranks"),
    ],
)
def test_what_cannot_be_shared_is_refused(options: dict[str, Any], complaint: str) -> None:
    def run(rank: int) -> str:
        module = nn.Linear(3, 2)
        arguments = {"data_loader": DataLoader(TensorDataset(torch.zeros(20, 3)), batch_size=4), **options}
        with pytest.raises(ConfigurationError) as raised:
            PrivacyEngine(seed=0).make_private(
                module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0,
                max_grad_norm=1.0, **arguments,
            )  # fmt: skip
        return str(raised.value)

    assert all(complaint in said for said in on_ranks(2, run))

"""Every layer, option and mode: the clipped sum is the textbook's, in one piece and in several, float64 and float32."""

from __future__ import annotations

import pytest
import torch
from all_cases import ALL, BY_NAME
from layer_case import RECORDS
from private_step import MODES, sampled_steps, step_by_hand, step_from_loader, truth
from single_record import assert_same_gradients, expected_gradient, norm

from ghostgrad import UnsupportedModuleError

# torch says that an even kernel with padding="same" may copy the input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

FLOWS = {
    "one piece": {"physical": None, "accumulation_steps": 1},
    "memory manager": {"physical": 3, "accumulation_steps": 1},
    "accumulation of 2": {"physical": None, "accumulation_steps": 2},
    "accumulation of 3": {"physical": None, "accumulation_steps": 3},
    "accumulation of 2 in a memory manager": {"physical": 2, "accumulation_steps": 2},
}

REPRESENTATIVES = [
    BY_NAME[name]
    for name in (
        "linear-3d-gram", "conv2d-small-network", "embedding-padding", "bag-mean-padding", "layernorm-3d", "class-token",
        "tied-table-and-two-heads", "siamese-product", "outputs-dataclass", "time-first-pooled",
    )
]  # fmt: skip


EVERY_MODE = [(case, mode) for case in ALL for mode in MODES if case.generic or mode != "functorch"]


@pytest.mark.parametrize("case", ALL, ids=str)
def test_some_records_are_clipped_and_some_are_not(case):
    each, bound = truth(case)
    clipped = sum(norm(gradients) > bound for gradients in each)
    assert 0 < clipped < RECORDS


@pytest.mark.parametrize(("case", "mode"), EVERY_MODE, ids=str)
def test_a_batch_in_one_piece(case, mode):
    each, bound = truth(case)
    found = step_by_hand(case, mode, max_grad_norm=bound)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


@pytest.mark.parametrize(("case", "mode"), EVERY_MODE, ids=str)
def test_a_batch_in_uneven_pieces_of_a_memory_manager(case, mode):
    each, bound = truth(case)
    found = step_from_loader(case, mode, max_grad_norm=bound, physical=3, loss_reduction="sum")
    expected = expected_gradient(each, bound, expected_batch_size=RECORDS, loss_reduction="sum")
    assert_same_gradients(found, expected, relative=1e-9)


@pytest.mark.parametrize(("case", "mode"), EVERY_MODE[::3], ids=str)  # each mode meets a quarter of the cases
def test_empty_parts_of_a_batch_add_nothing(case, mode):
    each, bound = truth(case)
    found = step_by_hand(case, mode, max_grad_norm=bound, parts=(0, 3, 0, 4, 0))
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


@pytest.mark.parametrize(("case", "mode"), EVERY_MODE[1::4], ids=str)
def test_sampled_batches_with_empty_parts(case, mode):
    """Poisson draws at a rate below 1, dealt to three parts, one record at a time: some parts, some draws are empty."""
    each, bound = truth(case)
    steps = sampled_steps(case, mode, max_grad_norm=bound, sample_rate=0.3)
    sizes = [len(drawn) for drawn, _ in steps]
    assert min(sizes) == 0, sizes
    assert max(sizes) > 1, sizes
    for drawn, found in steps:
        if drawn:
            expected = expected_gradient([each[i] for i in drawn], bound, expected_batch_size=0.3 * RECORDS)
            assert_same_gradients(found, expected, relative=1e-9)
        else:
            assert norm(found) == 0


@pytest.mark.parametrize("case", [case for case in ALL if not case.generic], ids=str)
def test_what_the_generic_rule_may_not_be_able_to_run_is_exact_or_refused_by_name(case):
    each, bound = truth(case)
    try:
        found = step_by_hand(case, "functorch", max_grad_norm=bound)
    except UnsupportedModuleError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)
    assert refusal == "" or refusal.startswith("bag: ")


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, mode) for case, mode in EVERY_MODE if mode in ("ghost", "bk") or case in REPRESENTATIVES],
    ids=str,
)
def test_single_precision(case, mode):
    each, bound = truth(case, torch.float32)
    found = step_by_hand(case, mode, max_grad_norm=bound, dtype=torch.float32)
    expected = expected_gradient(each, bound, expected_batch_size=RECORDS)
    assert_same_gradients(found, expected, relative=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("case", REPRESENTATIVES, ids=str)
def test_however_the_batch_comes(case, flow, loss_reduction, mode):
    each, bound = truth(case)
    found = step_from_loader(case, mode, max_grad_norm=bound, loss_reduction=loss_reduction, **FLOWS[flow])
    expected = expected_gradient(each, bound, expected_batch_size=RECORDS, loss_reduction=loss_reduction)
    assert_same_gradients(found, expected, relative=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("parts", [(4, 3), (1, 6), (5, 1, 1), (1, 1, 1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("case", REPRESENTATIVES[:6], ids=str)
def test_several_backwards_before_a_step(case, parts, loss_reduction, mode):
    each, bound = truth(case)
    found = step_by_hand(case, mode, max_grad_norm=bound, parts=parts, loss_reduction=loss_reduction)
    expected = expected_gradient(each, bound, expected_batch_size=RECORDS, loss_reduction=loss_reduction)
    assert_same_gradients(found, expected, relative=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clipping", ["per_layer", "automatic"])
@pytest.mark.parametrize("case", REPRESENTATIVES, ids=str)
def test_other_clip_functions(case, clipping, mode):
    each, bound = truth(case)
    found = step_by_hand(case, mode, max_grad_norm=bound / 3, clipping=clipping, expected_batch_size=5.5)
    expected = expected_gradient(each, bound / 3, expected_batch_size=5.5, clipping=clipping)
    assert_same_gradients(found, expected, relative=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_bound_for_each_parameter(mode):
    case = BY_NAME["conv2d-small-network"]
    each, bound = truth(case)
    bounds = [bound * share for share in (0.3, 0.01, 0.5, 2.0, 0.1, 0.2)]
    found = step_by_hand(case, mode, max_grad_norm=bounds, clipping="per_layer")
    assert_same_gradients(
        found, expected_gradient(each, bounds, expected_batch_size=RECORDS, clipping="per_layer"), relative=1e-9
    )

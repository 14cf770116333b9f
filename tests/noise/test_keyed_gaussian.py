"""The keyed noise: its law, its addressing, and the near misses that the tests must notice."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ghostgrad import keystream
from ghostgrad.errors import ConfigurationError, MissingDependencyError
from ghostgrad.keys import RunKey
from ghostgrad.keystream import AESKeystream, PhiloxKeystream
from ghostgrad.noise import KeyedGaussian, _box_muller

KEY = RunKey.from_seed(2024)
STREAMS = [AESKeystream, PhiloxKeystream]
MANY = 400_000
KNOWN = [-0.605307, -1.062592, 0.385305, 0.124744]  # step 4, vector 2
FALSE_ALARM = 1e-6  # draws are fixed by the key, so a test either always passes or never does


def draw(
    count: int, *, std: float = 1.0, step: int = 0, index: int = 0, offset: int = 0, dtype=torch.float32, noise=None
) -> torch.Tensor:
    tensor = torch.zeros(count, dtype=dtype)
    (noise or KeyedGaussian(KEY)).add_(tensor, std=std, step=step, index=index, offset=offset)
    return tensor


def with_stream(stream_type: type, *, secure: bool = False) -> KeyedGaussian:
    noise = KeyedGaussian(KEY, secure=secure)
    noise._stream_type = stream_type
    return noise


def p_value_of_std(values: torch.Tensor, std: float) -> float:
    """Two-sided chi-square test of the variance, mean known to be 0."""
    statistic = float((values.double() / std).square().sum())
    lower = stats.chi2.cdf(statistic, values.numel())
    return float(2 * min(lower, 1 - lower))


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stream_type", STREAMS)
def test_law_is_normal_with_the_given_std(stream_type: type, dtype: torch.dtype, secure: bool) -> None:
    values = draw(MANY, std=3.0, dtype=dtype, noise=with_stream(stream_type, secure=secure))
    assert stats.kstest(values.numpy(), stats.norm(scale=3.0).cdf).pvalue > 1e-3
    assert p_value_of_std(values, 3.0) > 1e-3
    assert abs(float(values.double().mean())) < 4 * 3.0 / MANY**0.5


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_the_test_of_std_rejects_five_percent(factor: float) -> None:
    values = draw(10_000, std=factor)
    assert p_value_of_std(values, 1.0) < FALSE_ALARM
    assert stats.kstest(draw(MANY, std=factor).numpy(), "norm").pvalue < FALSE_ALARM


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_have_the_right_mass(dtype: torch.dtype) -> None:
    values = draw(2_000_000, dtype=dtype).abs()
    for bound in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(bound) * values.numel()
        assert abs(int((values > bound).sum()) - expected) < 5 * expected**0.5
    assert bool(torch.isfinite(values).all())


def test_smallest_and_largest_words_give_finite_values() -> None:
    class Extreme(keystream.Keystream):
        def __init__(self, word: int) -> None:
            self.word = word

        def fill(self, out, first_page: int) -> None:
            out[:-16].view("<i4")[:] = self.word

    for word, radius in ((0, (2 * 32 * np.log(2)) ** 0.5), (-(2**31), 0.0), (2**31 - 1, 0.0)):
        values = torch.zeros(1024)
        _box_muller.add_gaussians([Extreme(word)], [(0, values)], std=1.0, dtype=torch.float32)
        assert values[:512].hypot(values[512:]).numpy() == pytest.approx(radius, abs=1e-6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"step": 1}, {"step": 2}),
        ({"index": 0}, {"index": 1}),
        ({"step": 1, "index": 2}, {"step": 2, "index": 1}),
        ({"step": 1, "index": 11}, {"step": 11, "index": 1}),
        ({"offset": 0}, {"offset": 100_000}),
    ],
    ids=str,
)
def test_other_addresses_are_uncorrelated(first: dict, second: dict) -> None:
    a, b = draw(100_000, **first), draw(100_000, **second)
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4.5 / 100_000**0.5
    assert abs(float(torch.corrcoef(torch.stack([a.square(), b.square()]))[0, 1])) < 4.5 / 100_000**0.5


def test_neighbouring_elements_and_page_halves_are_uncorrelated() -> None:
    values = draw(MANY)
    for lag in (1, 2, 511, 512, 513, 1024, 4096):
        for power in (1, 2):
            x = values.pow(power)
            assert abs(float(torch.corrcoef(torch.stack([x[:-lag], x[lag:]]))[0, 1])) < 4.5 / MANY**0.5


def test_sum_over_addresses_has_the_variance_of_independent_draws() -> None:
    steps = torch.stack([draw(512, step=step) for step in range(300)])
    assert p_value_of_std(steps.sum(0), 300**0.5) > 1e-3
    assert p_value_of_std(steps.sum(1), 512**0.5) > 1e-3


@settings(deadline=None, max_examples=60)
@given(
    offset=st.integers(0, 99_999),
    count=st.integers(1, 40_000),
    chunk=st.sampled_from([1, 3, 32, 128]),
    double=st.booleans(),
    secure=st.booleans(),
)
def test_a_slice_is_the_slice_of_the_whole_draw(
    offset: int, count: int, chunk: int, double: bool, secure: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    noise = KeyedGaussian(KEY, secure=secure)
    whole = draw(140_000, std=0.7, dtype=dtype, noise=noise)
    before = _box_muller._SCRATCH_PAGES
    _box_muller._SCRATCH_PAGES = chunk
    try:
        part = draw(count, std=0.7, dtype=dtype, noise=noise, offset=offset)
    finally:
        _box_muller._SCRATCH_PAGES = before
    assert torch.equal(part, whole[offset : offset + count])


def test_slices_far_out_need_nothing_before_them() -> None:
    far = 2**40 + 1
    assert torch.equal(draw(1000, offset=far)[5:], draw(995, offset=far + 5))


def test_shares_of_ranks_make_up_the_whole() -> None:
    whole = draw(10_007)
    bounds = [0, 3001, 3002, 7777, 10_007]
    shares = [draw(stop - start, offset=start) for start, stop in pairwise(bounds)]
    assert torch.equal(torch.cat(shares), whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_count_changes_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        values = draw(300_000, std=2.0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(values, torch.cat([draw(150_000, std=2.0), draw(150_000, std=2.0, offset=150_000)]))


def test_order_of_calls_does_not_matter() -> None:
    noise = KeyedGaussian(KEY)
    late = draw(10, step=7, noise=noise)
    draw(10, step=3, noise=noise)
    assert torch.equal(draw(10, step=7, noise=noise), late)
    assert not torch.equal(draw(10, step=7, noise=KeyedGaussian(RunKey.from_seed(1))), late)


def test_known_answers() -> None:
    # A change of these means that old runs cannot be repeated.
    words = np.empty(4096 + 16, dtype=np.uint8)
    AESKeystream(KEY.derive("noise", 4, 2, 4)).fill(words, 0)
    signed = words[:-16].view("<i4").astype(np.float64)
    radius = np.sqrt(-2 * np.log(np.maximum(np.abs(signed[:512]), 0.5) / 2**31))
    angle = signed[512:] * np.pi / 2**31
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    np.testing.assert_allclose(draw(1024, step=4, index=2).numpy(), expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(draw(4, step=4, index=2).numpy(), KNOWN, rtol=1e-4)


def test_aes_keystream_is_nist_counter_mode() -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes(range(32))
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    block = encryptor.update((256 * 5).to_bytes(16, "big"))
    out = np.empty(4096 + 16, dtype=np.uint8)
    AESKeystream(key).fill(out, 5)
    assert out[:16].tobytes() == block


@pytest.mark.parametrize("stream_type", STREAMS)
def test_pages_of_a_keystream_do_not_depend_on_where_reading_began(stream_type: type) -> None:
    stream = stream_type(KEY.derive("noise", 0, 0))
    long, short = np.empty(300 * 4096 + 16, dtype=np.uint8), np.empty(2 * 4096 + 16, dtype=np.uint8)
    stream.fill(long, 3)
    stream.fill(short, 3 + 297)
    assert np.array_equal(long[297 * 4096 : 299 * 4096], short[:-16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strides_and_shape_do_not_matter(dtype: torch.dtype) -> None:
    flat = draw(6 * 50, dtype=dtype)
    strided = torch.zeros(50, 6, dtype=dtype).t()
    KeyedGaussian(KEY).add_(strided, std=1.0, step=0, index=0)
    assert torch.equal(strided, flat.view(6, 50))
    scalar = torch.zeros((), dtype=dtype)
    KeyedGaussian(KEY).add_(scalar, std=1.0, step=0, index=0)
    assert torch.equal(scalar, flat[0])


def test_noise_is_added_and_seen_by_autograd() -> None:
    leaf = torch.full((10,), 5.0, requires_grad=True)
    version = leaf._version
    KeyedGaussian(KEY).add_(leaf, std=1.0, step=0, index=0)
    assert torch.allclose(leaf.detach() - 5.0, draw(10), atol=1e-6)
    assert leaf.requires_grad
    assert leaf.is_leaf
    assert leaf._version > version


def test_zero_std_and_empty_tensors_add_nothing() -> None:
    assert torch.equal(draw(10, std=0.0), torch.zeros(10))
    assert draw(0).numel() == 0


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf"), -float("inf")])
def test_impossible_std_is_refused(std: float) -> None:
    with pytest.raises(ConfigurationError, match="std="):
        draw(3, std=std)


@pytest.mark.parametrize("address", [{"step": -1}, {"index": -1}, {"offset": -1}], ids=str)
def test_negative_address_is_refused(address: dict) -> None:
    with pytest.raises(ConfigurationError, match="=-1"):
        draw(3, **address)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigurationError, match="dtype"):
        draw(3, dtype=dtype)


def test_secure_noise_uses_four_terms_per_value() -> None:
    plain, secure = draw(1000), draw(1000, noise=KeyedGaussian(KEY, secure=True))
    lanes = []
    for lane in range(4):
        stream = AESKeystream(KEY.derive("noise", 0, 0, 4, lane))
        lanes.append(torch.zeros(1000))
        _box_muller.add_gaussians([stream], [(0, lanes[-1])], std=0.5, dtype=torch.float32)
    assert torch.equal(secure, lanes[0] + lanes[1] + lanes[2] + lanes[3])
    assert not torch.equal(plain, secure)


def test_without_cryptography_secure_is_refused_and_plain_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keystream, "HAS_CRYPTOGRAPHY", False)
    with pytest.raises(MissingDependencyError, match="pip install"):
        KeyedGaussian(KEY, secure=True)
    fallback = KeyedGaussian(KEY)
    assert "Philox" in fallback.name
    assert torch.equal(draw(10, noise=fallback), draw(10, noise=with_stream(PhiloxKeystream)))


def test_nothing_shows_the_key() -> None:
    noise = KeyedGaussian(KEY)
    assert repr(noise) == "KeyedGaussian(Gaussian (AES-CTR keystream))"


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    gaps=st.lists(st.sampled_from([0, 0, 0, 1, 1023, 5000]), min_size=8, max_size=8),
    scratch=st.sampled_from([1, 2, 5, 128]),
    double=st.booleans(),
    secure=st.booleans(),
)
def test_many_parts_at_once_get_what_each_gets_alone(
    sizes: list[int], gaps: list[int], scratch: int, double: bool, secure: bool
) -> None:
    noise = KeyedGaussian(KEY, secure=secure)
    together, place = [], 0
    for i, (size, gap) in enumerate(zip(sizes, gaps, strict=False)):
        place += gap  # of frozen parameters, or of other ranks
        together.append((place, torch.zeros(size, dtype=torch.float64 if double and i % 2 else torch.float32)))
        place += size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_box_muller, "_SCRATCH_PAGES", scratch)
        noise.add_all_(together, std=0.7, step=3)
    for place, tensor in together:
        alone = draw(tensor.numel(), std=0.7, step=3, offset=place, dtype=tensor.dtype, noise=noise)
        assert torch.equal(tensor, alone)


def test_single_and_double_precision_share_no_words() -> None:
    """At one place of the vector their pages hold other addresses, so one stream would give words out twice."""
    pages = []
    for dtype in (torch.float32, torch.float64):
        pages.append(np.empty(4096 + 16, dtype=np.uint8))
        (stream,) = KeyedGaussian(KEY)._streams(3, 0, dtype)
        stream.fill(pages[-1], 0)
    single, double = (set(page[:-16].view("<i4").tolist()) for page in pages)
    assert len(single & double) < 3


@pytest.mark.parametrize("std", [1e-37, 1e-25, 1e25, 1e37])
def test_no_standard_deviation_is_lost_in_its_square(std: float) -> None:
    """In float32 the square of a small one is 0, and there would be no noise."""
    noise = KeyedGaussian(RunKey.from_seed(0))
    unit, scaled = torch.zeros(4096), torch.zeros(4096)
    noise.add_(unit, std=1.0, step=0, index=0)
    noise.add_(scaled, std=std, step=0, index=0)
    torch.testing.assert_close(scaled.double() / std, unit.double(), rtol=1e-5, atol=1e-6)

"""Top-k, min-p and top-p against a plain NumPy oracle, and what the draws amount to."""

import itertools

import numpy as np
import pytest
import torch

from onelaunch.engines.engine import Sampling
from onelaunch.engines.sampling import (
    LARGEST_FLOAT,
    LARGEST_UNIFORM,
    adjusted,
    draw,
    most_likely,
    penalised,
    sample_numbers,
    uniforms,
)
from onelaunch.errors import BadInput


def oracle(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probability of every token, in float64, one filter after another."""
    scaled = logits.astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = order[: sampling.top_k] if sampling.top_k else order
    kept = [i for i in kept if p[i] >= sampling.min_p * p[order[0]]]
    mass = sum(p[i] for i in kept)
    nucleus, reached = [], 0.0
    for i in kept:
        nucleus.append(i)
        reached += p[i] / mass
        if reached >= sampling.top_p:
            break
    result = np.zeros_like(p)
    result[nucleus] = p[nucleus] / p[nucleus].sum()
    return result


def drawn(logits: np.ndarray, sampling: Sampling, n: int = 4000) -> np.ndarray:
    """Shares of the tokens drawn by n equally spaced numbers: the distribution to within 1/n."""
    tensor = torch.from_numpy(logits.astype(np.float32))
    counts = np.zeros(len(logits))
    for i in range(n):
        counts[draw(tensor, sampling, torch.tensor([(i + 0.5) / n])).item()] += 1
    return counts / n


LOGITS = np.random.default_rng(0).normal(0, 2, 40)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(3.0),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_k=7),
        Sampling(1.0, top_k=40),
        Sampling(1.0, top_k=41),
        Sampling(1.0, top_p=0.9),
        Sampling(1.0, top_p=0.3),
        Sampling(1.0, top_p=1e-6),
        Sampling(1.0, top_p=0.999999),
        Sampling(1.0, min_p=0.1),
        Sampling(1.0, min_p=1.0),
        Sampling(2.0, top_k=20, min_p=0.05, top_p=0.8),
        Sampling(0.7, top_k=20, top_p=0.95),
        Sampling(1.5, min_p=0.02, top_p=0.7),
    ],
    ids=str,
)
def test_the_drawn_shares_are_the_oracles(sampling):
    expected = oracle(LOGITS, sampling)
    shares = drawn(LOGITS, sampling)
    # Each token owns one interval of [0, 1), and equally spaced numbers miss by one at each end.
    assert np.abs(shares - expected).max() <= 2 / 4000
    assert not shares[expected == 0].any()


@pytest.mark.parametrize("vocab", [2, 512, 5000])
@pytest.mark.parametrize("seed", range(6))
def test_exactly_the_oracles_tokens_can_be_drawn(vocab, seed):
    """First and last of what is left, found by the smallest and the largest number drawn."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.uniform(0.1, 5), vocab).astype(np.float32)
    sampling = Sampling(
        temperature=rng.uniform(0.2, 2),
        top_k=int(rng.choice([0, 1, 50])),
        top_p=rng.uniform(0.05, 0.95),
        min_p=float(rng.choice([0.0, 0.01])),
    )
    kept = np.flatnonzero(oracle(logits, sampling))
    by_weight = sorted(kept, key=lambda i: (-logits[i], i))
    tensor = torch.from_numpy(logits)
    largest = torch.tensor([LARGEST_UNIFORM])
    assert draw(tensor, sampling, torch.zeros(1)).item() == by_weight[0]
    assert draw(tensor, sampling, largest).item() == by_weight[-1]


def test_ties_keep_the_lower_ids():
    logits = np.zeros(10)
    assert np.flatnonzero(drawn(logits, Sampling(1.0, top_k=3), 100)).tolist() == [0, 1, 2]
    assert np.flatnonzero(drawn(logits, Sampling(1.0, top_p=0.35), 100)).tolist() == [0, 1, 2, 3]
    logits[5] = 1.0
    assert np.flatnonzero(drawn(logits, Sampling(1.0, top_k=3), 100)).tolist() == [0, 1, 5]


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
def test_a_token_that_cannot_be_is_never_drawn(filters):
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    sampling = Sampling(1.0, **filters)
    for u in (0.0, 0.25, 0.5, 0.75, LARGEST_UNIFORM):
        assert draw(logits, sampling, torch.tensor([u])).item() in (1, 3)


@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-30, 1e-3])
def test_cold_is_greedy(temperature):
    for u in (0.0, 0.5, LARGEST_UNIFORM):
        token = draw(torch.from_numpy(LOGITS).float(), Sampling(temperature), torch.tensor([u]))
        assert token.item() == LOGITS.argmax()


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e300])
def test_hot_is_uniform(temperature):
    shares = drawn(LOGITS, Sampling(temperature), 400)
    assert np.abs(shares - 1 / 40).max() <= 2 / 400


def test_the_largest_number_never_falls_off_the_end():
    """u x total rounds; it must stay below the total for every total."""
    largest = torch.tensor([LARGEST_UNIFORM])
    for seed in range(200):
        logits = torch.randn(97, generator=torch.Generator().manual_seed(seed))
        assert draw(logits, Sampling(1.0), largest).item() < 97


@pytest.mark.parametrize("penalty", [1.3, 0.7, 1.0, 2.0, 1e-3, 1e4])
@pytest.mark.parametrize("seed", range(4))
def test_the_repetition_penalty_is_transformers(penalty, seed):
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(seed)
    logits_V = 4 * torch.randn(300, generator=generator)
    logits_V[[7, 8]] = 0.0
    ids = [7, *torch.randint(300, (50,), generator=generator).tolist(), 7]
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected_1V = theirs(torch.tensor([ids]), logits_V[None].clone())
    assert torch.equal(penalised(logits_V, ids, penalty), expected_1V[0])


@pytest.mark.parametrize("penalty", [1.3, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_the_repetition_penalty_of_each_token_once(penalty, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(40, generator=generator)
    before_V = logits_V.clone()
    ids = torch.randint(40, (25,), generator=generator).tolist()
    found_V = penalised(logits_V, [*ids, *ids[:9]], penalty)
    assert torch.equal(logits_V, before_V)
    for token, (z, found) in enumerate(zip(before_V.double(), found_V.double(), strict=True)):
        expected = z if token not in ids else z / penalty if z > 0 else z * penalty
        assert found == pytest.approx(float(expected), rel=3e-7)
        assert token in ids or found == z
        assert token not in ids or (found < z) == (penalty > 1)


@pytest.mark.parametrize("penalty", [5e-324, 1e-40, 1e-30, 1e30, 1e39, 1.7e308])
def test_the_repetition_penalty_leaves_numbers_finite_and_others_alone(penalty):
    inf, nan = float("inf"), float("nan")
    logits_V = torch.tensor([0.0, 3e38, -3e38, 2.0, -2.0, inf, -inf, nan, 1.0])
    found = penalised(logits_V, range(8), penalty).tolist()
    assert found[0] == 0.0
    assert all(abs(z) <= LARGEST_FLOAT for z in found[:5])
    assert all(a >= 0 >= b for a, b in ((found[1], found[2]), (found[3], found[4])))
    assert found[5:7] == [inf, -inf]
    assert np.isnan(found[7])
    assert found[8] == 1.0
    if penalty > 1:
        assert found[1] < 1e9
        assert found[2] == -LARGEST_FLOAT
    else:
        assert found[1] == LARGEST_FLOAT
        assert found[2] > -1e9


@pytest.mark.parametrize("seed", range(6))
def test_the_adjusted_logits_are_those_of_the_definition(seed):
    """In float64, by loops: bias, then repetition penalty, then the counts' penalties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, 40).astype(np.float32)
    prompt, new = rng.integers(0, 40, 10).tolist(), rng.integers(0, 12, 25).tolist()
    sampling = Sampling(
        repetition_penalty=rng.choice([1.0, 1.3, 0.7]),
        presence_penalty=rng.choice([0.0, -2.0, 1.7]),
        frequency_penalty=rng.choice([0.0, 2.0, -0.3]),
        logit_bias={i: rng.uniform(-100, 100) for i in rng.choice(40, 5, replace=False).tolist()},
    )
    logits_V = torch.from_numpy(logits.copy())
    found = adjusted(logits_V, sampling, prompt, new).double()
    assert torch.equal(logits_V, torch.from_numpy(logits)), "they are the caller's"
    expected = logits.astype(np.float64)
    for token, amount in sampling.logit_bias:
        expected[token] += amount
    for token in {*prompt, *new}:
        z = expected[token]
        by = sampling.repetition_penalty
        expected[token] = z / by if z > 0 else z * by
    for token in set(new):
        expected[token] -= sampling.frequency_penalty * new.count(token)
        expected[token] -= sampling.presence_penalty
    assert found.numpy() == pytest.approx(expected, abs=3e-5)


def test_each_option_acts_on_its_tokens_alone():
    logits_V = torch.tensor([2.0, -2.0, 2.0, 2.0, 2.0])
    prompt, new = [0, 1, 1], [2, 3, 3]
    for options, expected in [
        ({}, [2.0, -2.0, 2.0, 2.0, 2.0]),
        ({"presence_penalty": 1.5}, [2.0, -2.0, 0.5, 0.5, 2.0]),
        ({"frequency_penalty": 1.5}, [2.0, -2.0, 0.5, -1.0, 2.0]),
        ({"presence_penalty": -1.0, "frequency_penalty": 0.25}, [2.0, -2.0, 2.75, 2.5, 2.0]),
        ({"logit_bias": {4: -100, 0: 1}}, [3.0, -2.0, 2.0, 2.0, -98.0]),
        ({"logit_bias": [(1, 4.0)], "repetition_penalty": 2.0}, [1.0, 1.0, 1.0, 1.0, 2.0]),
        ({"repetition_penalty": 2.0, "frequency_penalty": 1.0}, [1.0, -4.0, 0.0, -1.0, 2.0]),
    ]:
        sampling = Sampling(**options)
        assert sampling.adjusts == bool(options)
        assert adjusted(logits_V, sampling, prompt, new).tolist() == expected, options
        fresh = adjusted(logits_V, sampling, prompt, [])
        if not (sampling.penalises or sampling.logit_bias):
            assert torch.equal(fresh, logits_V), "tokens of the prompt are not counted"


def test_what_is_not_finite_stays_so():
    inf, nan = float("inf"), float("nan")
    logits_V = torch.tensor([inf, -inf, nan, 3e38, -3e38, 1.0])
    bias = {i: 100.0 if i % 2 else -100.0 for i in range(6)}
    found = adjusted(
        logits_V, Sampling(presence_penalty=2, frequency_penalty=2, logit_bias=bias), [], range(6)
    )
    assert found[:2].tolist() == [inf, -inf]
    assert found[2].isnan()
    assert found[3:5].tolist() == logits_V[3:5].tolist()
    assert found[5] == 97.0


def test_the_drawn_shares_are_those_of_the_adjusted_logits():
    """A chi-square test of 4,000 draws by random numbers, of tokens that are expected 5 times."""
    sampling = Sampling(
        0.8, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.4,
        logit_bias={0: 2.5, 7: -100.0, 11: 1.0},
    )  # fmt: skip
    prompt, new = [3, 4, 5], [11, 0, 11, 20, 11]
    logits_V = torch.from_numpy(LOGITS).float()
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros(40)
    scores_V = adjusted(logits_V, sampling, prompt, new)
    for _ in range(4000):
        counts[int(draw(scores_V, sampling, torch.rand(1, generator=generator)))] += 1
    scores = LOGITS.astype(np.float64).copy()
    for token, amount in sampling.logit_bias:
        scores[token] += amount
    for token in {*prompt, *new}:
        scores[token] = scores[token] / 1.2 if scores[token] > 0 else scores[token] * 1.2
    for token in set(new):
        scores[token] -= 0.4 * new.count(token) + 0.5
    expected = 4000 * oracle(scores, sampling)
    assert counts[7] == 0
    seen = expected >= 5
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    freedom = int(seen.sum()) - 1
    assert freedom > 10
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # some five standard deviations


@pytest.mark.parametrize("n", [0, 1, 3, 5, 6, 20])
def test_the_most_likely_tokens_are_in_order_and_the_lower_id_first(n):
    logprobs_V = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.2]).log()
    expected = [(i, logprobs_V[i].item()) for i in (1, 3, 4, 0, 2)]
    assert most_likely(logprobs_V, n) == tuple(expected[:n])


@pytest.mark.parametrize("vocab", [2, 100, 5000])
def test_the_most_likely_tokens_of_many(vocab):
    generator = torch.Generator().manual_seed(vocab)
    logprobs_V = torch.randn(vocab, generator=generator).mul_(4).round_().log_softmax(-1)
    order = sorted(range(vocab), key=lambda i: (-logprobs_V[i].item(), i))[:20]
    found = most_likely(logprobs_V, 20)
    assert [token for token, _ in found] == order
    assert [logprob for _, logprob in found] == logprobs_V[order].tolist()


def test_copies_of_a_prompt_are_numbered():
    assert sample_numbers([[1], [2, 1], [1], (2, 1), [1], [2]]) == [0, 0, 1, 1, 2, 0]


def test_uniforms_depend_on_seed_prompt_and_copy_alone():
    assert torch.equal(uniforms(1, [2, 3], 0, 10), uniforms(1, (2, 3), 0, 10))
    assert torch.equal(uniforms(1, [2], 0, 10)[:4], uniforms(1, [2], 0, 4))
    different = itertools.product(range(-4, 4), ([1], [11], [1, 1], [1, 0], [0, 1], [2]), range(3))
    firsts = {uniforms(seed, prompt, copy, 1).item() for seed, prompt, copy in different}
    assert len(firsts) == 8 * 6 * 3
    many = uniforms(0, [0], 0, 20000)
    assert many.dtype == torch.float32
    assert 0 < many.min() < many.max() <= LARGEST_UNIFORM
    # mean of n uniforms: standard deviation 1/sqrt(12 n), here 0.002
    assert abs(many.mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.3},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": float("nan")},
        {"presence_penalty": 2.001},
        {"presence_penalty": -2.001},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": 2.001},
        {"frequency_penalty": -2.001},
        {"frequency_penalty": float("-inf")},
        {"logit_bias": {3: 100.001}},
        {"logit_bias": {3: -100.001}},
        {"logit_bias": {3: float("-inf")}},
        {"logit_bias": {3: float("nan")}},
        {"logit_bias": {"3": 1.0}},
        {"logit_bias": {3: "1"}},
        {"logit_bias": {3.0: 1.0}},
        {"logit_bias": {3: True}},
        {"logit_bias": {3: None}},
        {"logit_bias": 3},
        {"logit_bias": "text"},
        {"logit_bias": [3, 4]},
        {"logit_bias": [(3, 1.0, 2.0)]},
        {"logit_bias": [(3, 1.0), (4, 1.0), (3, 2.0)]},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(BadInput, match=f"^{next(iter(bad))}="):
        Sampling(**bad)


def test_settings_at_their_bounds_are_taken():
    for sign in (-1, 1):
        ends = Sampling(
            presence_penalty=2 * sign, frequency_penalty=2 * sign, logit_bias={3: 100 * sign, 0: 0}
        )
        assert ends.adjusts
        assert ends.logit_bias == ((3, 100.0 * sign), (0, 0.0))
    pairs = ((3, 1.0), (5, -2.5))
    for bias in (dict(pairs), list(pairs), iter(pairs), pairs):
        assert Sampling(logit_bias=bias) == Sampling(logit_bias=pairs)
    assert Sampling(logit_bias={np.int64(3): np.float32(0.5)}).logit_bias == ((3, 0.5),)
    assert hash(Sampling(logit_bias={3: 1})) == hash(Sampling(logit_bias=[(3, 1.0)]))
    assert not Sampling(logit_bias={}).adjusts

"""Choosing one token by its logits, in PyTorch. V vocabulary, C candidates left by the filters."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from onelaunch.engines.engine import Request, Sampling

# Below this a float32 quotient overflows for every logit but the best: it is greedy already.
_SMALLEST_TEMPERATURE = 1e-30

SMALLEST_PENALTY, LARGEST_FLOAT = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max

LARGEST_UNIFORM = 1.0 - 2.0**-24
"""The float32 before 1; times any total it rounds to less than the total."""


def sample_numbers(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt, how many equal ones stand before it: the `sample` of its request."""
    seen: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for prompt in prompts:
        key = tuple(prompt)
        numbers.append(seen[key])
        seen[key] += 1
    return numbers


def request_uniforms(request: Request, n: int) -> Tensor | None:
    """The random numbers of a request's first `n` tokens; None where it is greedy."""
    if request.sampling.greedy:
        return None
    return uniforms(request.sampling.seed, request.prompt_ids, request.sample, n)


def uniforms(seed: int, prompt: Sequence[int], sample: int, n: int) -> Tensor:
    """`n` numbers from 0 to below 1 for a sequence's new tokens in order, float32 on the CPU.

    They depend on nothing but the seed, the prompt's ids and the sample's number: other prompts,
    their order and lengths, and the device do not shift them.
    """
    text = " ".join(map(str, (seed, sample, *prompt)))
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    # float64 first: float32 draws an exact 0, and with it the first id however unlikely, once in
    # 17 million times. The bound undoes the rounding up to 1.
    fine = torch.rand(n, generator=generator, dtype=torch.float64)
    return fine.float().clamp_(max=LARGEST_UNIFORM)


def float32_penalty(penalty: float) -> float:
    """A repetition penalty within the range of float32: neither 0 nor infinite there."""
    return min(max(penalty, SMALLEST_PENALTY), LARGEST_FLOAT)


def penalised(logits_V: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """The float32 logits with the repetition penalty of the tokens `ids`, once for each, however
    often it is there: z / penalty where z > 0, else z * penalty.

    A finite logit stays finite, at most LARGEST_FLOAT; others stay as they are. `logits_V` is not
    changed.
    """
    penalty = float32_penalty(penalty)
    seen_N = torch.tensor(ids, device=logits_V.device)
    z_N = logits_V[seen_N]
    changed_N = torch.where(z_N > 0, z_N / penalty, z_N * penalty)
    changed_N = changed_N.clamp(-LARGEST_FLOAT, LARGEST_FLOAT)
    return logits_V.index_put((seen_N,), torch.where(z_N.isinf(), z_N, changed_N))


def adjusted(
    logits_V: Tensor, sampling: Sampling, prompt_ids: Sequence[int], new: Sequence[int]
) -> Tensor:
    """The float32 logits as `Sampling` changes them before the temperature: bias, repetition
    penalty, then frequency and presence penalty. `logits_V` is not changed."""
    if sampling.logit_bias:
        ids, amounts = zip(*sampling.logit_bias, strict=True)
        logits_V = _plus(logits_V, ids, torch.tensor(amounts))
    if sampling.penalises:
        logits_V = penalised(logits_V, [*prompt_ids, *new], sampling.repetition_penalty)
    if sampling.counts and new:
        counts = Counter(new)
        # the product is exact in float64: fused with the sum or not, as compiled code may have it,
        # the bits are the same
        of_sampling = torch.tensor([sampling.frequency_penalty, sampling.presence_penalty])
        frequency, presence = of_sampling.double()
        n_N = torch.tensor(list(counts.values()), dtype=torch.float64)
        logits_V = _plus(logits_V, list(counts), -(n_N * frequency + presence).float())
    return logits_V


def _plus(logits_V: Tensor, ids: Sequence[int], amount_N: Tensor) -> Tensor:
    """The logits with amounts added to those of tokens, of which none is there twice."""
    ids_N = torch.tensor(ids, device=logits_V.device)
    return logits_V.index_add(0, ids_N, amount_N.to(logits_V.device))


def most_likely(logprobs_V: Tensor, n: int) -> tuple[tuple[int, float], ...]:
    """The `n` most likely tokens, or all where there are fewer, with their log-probabilities: the
    most likely first, of equally likely ones the lower id."""
    n = min(n, len(logprobs_V))
    if n == 0:
        return ()
    least = torch.topk(logprobs_V, n).values[-1]  # of what is as likely, topk takes any
    ids_C = torch.nonzero(logprobs_V >= least).flatten()
    values_C, order = torch.sort(logprobs_V[ids_C], descending=True, stable=True)
    return tuple(zip(ids_C[order][:n].tolist(), values_C[:n].tolist(), strict=True))


def draw(logits_V: Tensor, sampling: Sampling, uniform_1: Tensor) -> Tensor:
    """The id drawn by one uniform number, shape (1,), by inverting the cumulative distribution.

    In this order: divide by the temperature; keep the `top_k` most likely; of these the ones at
    least `min_p` times as likely as the best; of these, renormalized, the smallest set that
    reaches `top_p`. Among equally likely tokens the lower id is kept first. `sampling` must not
    be greedy and the largest logit must be finite.
    """
    temperature = max(sampling.temperature, _SMALLEST_TEMPERATURE)
    # relative to the best token, whose weight is 1; `min_p` is then a plain threshold
    weights = torch.exp((logits_V - logits_V.max()) / temperature)
    if not (sampling.top_k or sampling.min_p or sampling.top_p < 1.0):
        return _invert(weights, uniform_1)
    ids_C, weights_C = _keep_likely(weights, sampling)
    return ids_C[_invert(weights_C, uniform_1)]


def _keep_likely(weights_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Ids and weights that the filters leave, the most likely first.

    Sorting 32,000 floats takes torch 2 ms on one core, a third of a small model's token, so what
    certainly falls is dropped first.
    """
    V = len(weights_V)
    k = min(sampling.top_k or V, V)
    floor = torch.full((), sampling.min_p, device=weights_V.device)
    if k < V:
        floor = torch.maximum(floor, torch.topk(weights_V, k).values[-1])
    ids_C = torch.nonzero(weights_V >= floor).flatten()
    weights_C = weights_V[ids_C]
    total = weights_C.sum()
    if k == V and sampling.top_p < 1.0:
        # Even a whole vocabulary of such tokens makes less than half of what `top_p` leaves out.
        certain = weights_C >= 0.5 * (1.0 - sampling.top_p) * total / V
        ids_C, weights_C = ids_C[certain], weights_C[certain]
    weights_C, order = torch.sort(weights_C, descending=True, stable=True)
    ids_C, weights_C = ids_C[order][:k], weights_C[:k]
    if sampling.top_p < 1.0:
        if k < V:
            total = weights_C.sum()  # without the ties beyond the k-th
        before = torch.cumsum(weights_C, 0) - weights_C
        n = max(1, int((before < sampling.top_p * total).sum()))
        ids_C, weights_C = ids_C[:n], weights_C[:n]
    return ids_C, weights_C


def _invert(weights_C: Tensor, uniform_1: Tensor) -> Tensor:
    """Index of the first token whose cumulative weight exceeds uniform x total."""
    reached = torch.cumsum(weights_C, 0)
    return torch.searchsorted(reached, uniform_1 * reached[-1], right=True)

"""The WKV-4 operator in plain torch, twice: as a recurrence over time, and parallel in time.

WKV is a weighted mean of the values up to step t, separately in each channel (arXiv 2305.13048, equation 16). With
w = -exp(time_decay) <= 0, the logarithm of the decay per step, and u = time_first, the bonus of the present step::

    output_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i  +  e^{u + k_t} v_t)
             / (sum_{i<t} e^{(t-1-i) w + k_i}      +  e^{u + k_t})

Each sum over the past follows from the one before: sum <- e^w sum + e^{k_t} v_t (in the denominator, without v_t). So
two numbers per channel are enough as a state. They could overflow, so the state also has a common exponent:
(num, den, max_exp) represents the sums e^max_exp num and e^max_exp den, and max_exp is the largest exponent in them.

Both functions are differentiable by autograd. The maxima are detached: they only scale the sums, chosen so that no
exponential exceeds 1, and the result does not depend on them.

    B  sequences    T  time steps    C  channels    L  leaves in a chunk    N  chunks
"""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EMPTY", "combine", "wkv4_recurrence", "wkv4_scan"]

# max_exp of the empty state. It is not -inf because (-inf) - (-inf) is NaN.
EMPTY = -1e38

# Leaves of a chunk, which are summed one after the other. T leaves take about log(T) / log(CHUNK) such loops.
CHUNK = 16

# num, den and max_exp, each (..., C), or (..., T, C) along time. They represent e^max_exp num and e^max_exp den.
Sums: TypeAlias = tuple[Tensor, Tensor, Tensor]


def wkv4_recurrence(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """WKV-4 as a loop over time steps (arXiv 2305.13048, appendix on numerical stability).

    With w = -exp(time_decay), u = time_first and the state (num p, den q, max_exp o), each step computes::

        n = max(o, u + k_t)    output_t  = (e^{o-n} p + e^{u+k_t-n} v_t) / (e^{o-n} q + e^{u+k_t-n})
        m = max(w + o, k_t)    (p, q, o) <- (e^{w+o-m} p + e^{k_t-m} v_t,  e^{w+o-m} q + e^{k_t-m},  m)

    time_decay and time_first are (C,), key and value (B, T, C), state (B, 3, C). All have one floating dtype, which is
    also that of the arithmetic. Returns the output (B, T, C) and the state after the last step (B, 3, C).
    """
    w = _decay(time_decay)
    num, den, max_exp = state.unbind(1)
    outputs = []
    for k, v in zip(key.unbind(1), value.unbind(1), strict=True):
        outputs.append(_output(time_first, k, v, num, den, max_exp))
        m = torch.maximum(w + max_exp, k).detach()
        before, now = torch.exp(w + max_exp - m), torch.exp(k - m)
        num, den, max_exp = before * num + now * v, before * den + now, m
    return torch.stack(outputs, dim=1), torch.stack((num, den, max_exp.detach()), dim=1)


def wkv4_scan(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """WKV-4 parallel in time, as prefix sums; the same arguments and results as :func:`wkv4_recurrence`.

    A leaf (num, den, max_exp) represents e^max_exp (num, den). The incoming state is the first leaf, and step i adds
    the leaf (v_i, 1, k_i). The state before step t is the sum of the leaves before t, each decayed by its age. The sum
    is associative, so the states of all steps are prefix sums, which can be computed in parallel.
    """
    num, den, max_exp = state.unbind(1)
    # Exponents are treated as constants. Their gradient flows through the factor e^(x - x) = 1.
    exponent = torch.cat((max_exp.unsqueeze(1), key), dim=1).clamp(min=EMPTY)
    scale = exponent.detach()
    one = torch.exp(exponent - scale)
    leaf_num = one * torch.cat((num.unsqueeze(1), value), dim=1)
    leaf_den = one * torch.cat((den.unsqueeze(1), torch.ones_like(key)), dim=1)

    num, den, max_exp = _prefixes(_decay(time_decay), (leaf_num, leaf_den, scale))
    output = _output(time_first, key, value, num[:, :-1], den[:, :-1], max_exp[:, :-1])
    return output, torch.stack((num[:, -1], den[:, -1], max_exp[:, -1]), dim=1)


def combine(earlier: Sums, later: Sums, w: Tensor) -> Sums:
    """The sums of two adjacent intervals of time. w: the log of the decay over the whole later interval.

    The operation is associative, so a long interval can be summed in any grouping.
    """
    m = torch.maximum(earlier[2] + w, later[2]).detach()
    before, now = torch.exp(earlier[2] + w - m), torch.exp(later[2] - m)
    return before * earlier[0] + now * later[0], before * earlier[1] + now * later[1], m


def _decay(time_decay: Tensor) -> Tensor:
    # A decay of e^69 (about 1e30) already forgets everything. A larger one gives 0 * inf = NaN, in the gradient too.
    return -torch.exp(time_decay.clamp(max=69.0))


def _output(time_first: Tensor, key: Tensor, value: Tensor, num: Tensor, den: Tensor, max_exp: Tensor) -> Tensor:
    n = torch.maximum(max_exp, time_first + key).detach()
    before, now = torch.exp(max_exp - n), torch.exp(time_first + key - n)
    return (before * num + now * value) / (before * den + now)


def _prefixes(w: Tensor, leaves: Sums) -> Sums:
    """The sums of the leaves up to each leaf, (..., T, C); w (C,) is the decay from one leaf to the next."""
    length = leaves[0].shape[-2]
    if length <= CHUNK:
        return _walk(w, leaves)

    # 1. Cut time into N chunks (..., N, L, C), and pad the last one with empty leaves.
    fill = -length % CHUNK
    chunks = [
        F.pad(x, (0, 0, 0, fill), value=empty).unflatten(-2, (-1, CHUNK))
        for x, empty in zip(leaves, (0.0, 0.0, EMPTY), strict=True)
    ]

    # 2. Compute the prefix sums inside all chunks at once.
    num, den, max_exp = local = _walk(w, (chunks[0], chunks[1], chunks[2]))

    # 3. The total of a chunk is a leaf too, CHUNK steps from the next. Compute the prefix sums of these, (..., N, C),
    #    by recursion, and give each chunk the sum of the chunks before it, (..., N, 1, C).
    totals = _prefixes(w * CHUNK, (num[..., -1, :], den[..., -1, :], max_exp[..., -1, :]))
    before = [
        F.pad(x, (0, 0, 1, -1), value=empty).unsqueeze(-2) for x, empty in zip(totals, (0.0, 0.0, EMPTY), strict=True)
    ]

    # 4. Add that sum to the chunk's own prefix sums, decayed by the steps since.
    places = torch.arange(1, CHUNK + 1, dtype=w.dtype, device=w.device).unsqueeze(-1)
    sums = combine((before[0], before[1], before[2]), local, w * places)
    num, den, max_exp = (x.flatten(-3, -2)[..., :length, :] for x in sums)
    return num, den, max_exp


def _walk(w: Tensor, leaves: Sums) -> Sums:
    first, *rest = zip(*(x.unbind(-2) for x in leaves), strict=True)
    sums = [first]
    for leaf in rest:
        sums.append(combine(sums[-1], leaf, w))
    num, den, max_exp = (torch.stack(x, dim=-2) for x in zip(*sums, strict=True))
    return num, den, max_exp

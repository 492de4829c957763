"""The WKV-7 operator in plain torch, twice: as a recurrence over time, and in chunks of time by matrix products.

Each head has a state S (N, N), whose rows are values and whose columns are keys (arXiv 2503.14456, equation 17). With
w = exp(-e^-0.5 sigmoid(decay)), the decay per step and key channel::

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        output_t = S_t r_t

Both functions are differentiable by autograd, take any N, and compute in the dtype of their arguments.

    B  sequences    T  time steps    H  heads    N  channels of a head    L  steps in a chunk    M  chunks
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DECAY_RATE", "wkv7_recurrence", "wkv7_scan"]

# A step keeps at least e^-DECAY_RATE = 0.545 of a channel of the state.
DECAY_RATE = math.exp(-0.5)

# Steps in a chunk. Exponents are relative to the middle of a chunk, so none exceeds DECAY_RATE * CHUNK / 2 = 4.9.
CHUNK = 16


def wkv7_recurrence(
    receptance: Tensor, decay: Tensor, key: Tensor, value: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """WKV-7 as a loop over time steps (arXiv 2503.14456, equation 17).

    Inputs are (B, T, H, N), decay is raw, and state is (B, H, N, N). Returns the output (B, T, H, N) and the state
    after the last step (B, H, N, N).
    """
    w = torch.exp(-DECAY_RATE * torch.sigmoid(decay))
    outputs = []
    for r_t, w_t, k_t, v_t, a_t, b_t in zip(*(x.unbind(1) for x in (receptance, w, key, value, a, b)), strict=True):
        removed = state @ a_t.unsqueeze(-1)
        state = state * w_t.unsqueeze(-2) + removed * b_t.unsqueeze(-2) + v_t.unsqueeze(-1) * k_t.unsqueeze(-2)
        outputs.append((state @ r_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1), state


def wkv7_scan(
    receptance: Tensor, decay: Tensor, key: Tensor, value: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """WKV-7 parallel within chunks of time; the same arguments and results as :func:`wkv7_recurrence`.

    A chunk maps the state S before it to S P + C. P and C of all chunks follow at once from their own inputs; only
    this map is applied chunk by chunk.

    A NaN or infinity spreads to all steps of its chunk, also to earlier ones.
    """
    B, T, H, N = key.shape
    if T == 1:  # faster, and the gradient of decay is not a difference of large sums
        return wkv7_recurrence(receptance, decay, key, value, a, b, state)
    # The shortest power of two that holds all steps of a short text.
    L = min(CHUNK, 1 << (T - 1).bit_length())

    def split(x: Tensor) -> Tensor:
        """(B, T, H, N) -> (B, H, M, L, N), padded with zeros, which are steps that leave the state as it is."""
        return F.pad(x, (0, 0, 0, 0, 0, -T % L)).unflatten(1, (-1, L)).permute(0, 3, 1, 2, 4)

    log_w = split(-DECAY_RATE * torch.sigmoid(decay))
    r, k, v, a, b = (split(x) for x in (receptance, key, value, a, b))

    # 1. Log decay from the start of the chunk to each step, with and without the step's own decay.
    upto = log_w.cumsum(-2)
    before, middle, end = upto - log_w, upto[..., (L - 1) // 2, None, :], upto[..., -1:, :]
    grow, shrink = torch.exp(middle - upto), torch.exp(upto - middle)
    r_mid, a_mid, k_mid, b_mid = r * shrink, a * torch.exp(before - middle), k * grow, b * grow

    # 2. The influence of earlier steps (columns) on each step (rows), and S a_t = U_t + S_0 W_t.
    ab, ak = (torch.tril(a_mid @ x.mT, -1) for x in (b_mid, k_mid))
    rb, rk = (torch.tril(r_mid @ x.mT) for x in (b_mid, k_mid))
    U, W = (_inverse(ab) @ torch.cat((ak @ v, a * torch.exp(before)), dim=-1)).split(N, dim=-1)

    # 3. P and C, and the state before each chunk.
    rest = torch.exp(end - upto)
    k_end, b_end = k * rest, b * rest
    P = torch.diag_embed(torch.exp(end.squeeze(-2))) + W.mT @ b_end
    C = v.mT @ k_end + U.mT @ b_end
    states = []
    for P_m, C_m in zip(P.unbind(2), C.unbind(2), strict=True):
        states.append(state)
        state = torch.baddbmm(C_m.flatten(0, 1), state.flatten(0, 1), P_m.flatten(0, 1)).unflatten(0, (B, H))
    start = torch.stack(states, dim=2)

    # 4. The output, from the steps of the chunk and from the state before it.
    output = rk @ v + rb @ U + (r * torch.exp(upto) + rb @ W) @ start.mT
    return output.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T], state


def _inverse(strict_lower: Tensor) -> Tensor:
    """(I - A)^-1 = (I + A)(I + A^2)(I + A^4)... for a strictly lower triangular A (..., L, L), L a power of two."""
    length = strict_lower.shape[-1]
    power, steps = strict_lower, 2
    inverse = torch.eye(length, dtype=power.dtype, device=power.device) + power
    while steps < length:
        power = power @ power
        inverse = inverse + inverse @ power
        steps *= 2
    return inverse

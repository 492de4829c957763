"""A self-test of each library in libraries.py: one of its operators, compared with the plain form in float64.

It finds a wrong build, such as one by a broken compiler; tests/ops covers the details.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_pl.ops.backend import use_kernel
from rwkv_pl.ops.cross_entropy import cross_entropy
from rwkv_pl.ops.wkv4 import wkv4
from rwkv_pl.ops.wkv7 import wkv7

__all__ = ["MAX_ERROR", "SELF_TESTS", "measure_error"]

# Relative error of the results and gradients: five times that of float32's rounding.
MAX_ERROR = 5e-6


def _draw(device: str | torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Differentiable, standard normal arguments from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def _with_gradients(result: Tensor, arguments: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of all arguments for a gradient of the result that is not constant."""
    grad_result = torch.linspace(-1, 1, result.numel(), device=result.device, dtype=result.dtype).view_as(result)
    return [result.detach(), *torch.autograd.grad(result, arguments, grad_result)]


def _run_cross_entropy(steps: int, device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
    (logits,) = _draw(device, dtype, (steps, 512))
    targets = torch.arange(steps, device=device) * 7 % 512
    return _with_gradients(torch.stack(cross_entropy(logits, targets)), [logits])


def _run_wkv4(steps: int, device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
    arguments = _draw(device, dtype, (512,), (512,), (1, steps, 512), (1, steps, 512))
    return _with_gradients(wkv4(*arguments)[0], arguments)


def _run_wkv7(steps: int, device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
    arguments = _draw(device, dtype, *[(1, steps, 8, 64)] * 6)
    receptance, decay, key, value, removed, gate = arguments
    a = -F.normalize(removed, dim=-1)
    return _with_gradients(wkv7(receptance, decay, key, value, a, -a * gate.sigmoid())[0], arguments)


# By library: a function of steps, device and dtype that computes the results and gradients of an example with 512
# channels.
SELF_TESTS: dict[str, Callable[[int, str | torch.device, torch.dtype], list[Tensor]]] = {
    "elementwise": _run_cross_entropy,
    "wkv4": _run_wkv4,
    "wkv7": _run_wkv7,
}


def measure_error(library: str, device: str, steps: int = 300) -> float:
    """The largest relative error, |result - reference| / |reference|, of an example with the selected kernel."""
    got = SELF_TESTS[library](steps, device, torch.float32)
    with use_kernel("recurrence"):
        reference = SELF_TESTS[library](steps, "cpu", torch.float64)
    return max(float((x.cpu().double() - y).norm() / y.norm()) for x, y in zip(got, reference, strict=True))

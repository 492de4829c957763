"""For the tests of fused blocks: dropout with a given mask, and errors of tensors relative to all of them."""

from torch import nn


class Masked(nn.Module):
    """Dropout with a given mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask.to(x.dtype)


def relative_errors(found, reference):
    """The error of each tensor relative to its norm plus a part of all norms: in small tensors terms cancel."""
    all_norms = sum(float(y.detach().norm()) for y in reference) / len(reference)
    return [
        float((x.double() - y).detach().norm() / (y.detach().norm() + 0.2 * all_norms))
        for x, y in zip(found, reference, strict=True)
    ]

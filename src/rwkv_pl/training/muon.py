"""One optimizer that combines two of torch's: Muon for the weight matrices of the blocks, AdamW for everything else.

Muon (https://kellerjordan.github.io/posts/muon/) computes the momentum of a matrix's gradient and moves the matrix in
the direction of the nearest orthogonal matrix, which it finds with a Newton-Schulz iteration. It is for matrices
between hidden layers, so AdamW trains the embedding, the head and all vectors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class MuonAdamW(Optimizer):
    """Muon for the parameter groups with muon=True, fused AdamW for the others.

    lr, weight_decay: for both.
    betas:            for AdamW.
    eps:              for AdamW, and Muon's smallest norm of a gradient.
    momentum, nesterov, ns_steps (Newton-Schulz iterations), adjust_lr_fn: for Muon. adjust_lr_fn="match_rms_adamw"
                      scales Muon's steps to the size of AdamW's, so that one learning rate suits both (arXiv
                      2502.16982); "original" does not.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        common = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, common | muon)
        # Built only so that both check their arguments, even if one of them gets no group.
        torch.optim.Muon([torch.zeros(1, 1)], lr, weight_decay, eps=eps, **muon)  # type: ignore[arg-type]
        torch.optim.AdamW([torch.zeros(1)], lr, betas, eps, weight_decay)
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the shared groups and state; load_state_dict calls this after replacing both."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Build the two optimizers on this one's groups and state, which their steps then read and write."""
        muon = [group for group in self.param_groups if group.get("muon")]
        others = [group for group in self.param_groups if not group.get("muon")]
        self._parts: list[Optimizer] = [torch.optim.Muon(muon)] if muon else []
        self._parts += [torch.optim.AdamW(others, fused=True)] if others else []
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step of both. Returns the result of `closure`, which computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

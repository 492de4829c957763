"""Muon for the weight matrices of the blocks, AdamW for everything else: one optimizer, made of torch's own two.

Muon (https://kellerjordan.github.io/posts/muon/) takes the momentum of a matrix's gradient and moves the matrix along
the nearest orthogonal one, which a Newton-Schulz iteration finds. It is meant for matrices between hidden layers, so
embedding, head and all vectors are AdamW's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class MuonAdamW(Optimizer):
    """Muon over the parameter groups that have muon=True, fused AdamW over the others.

    lr, weight_decay: of both. match_rms_adamw scales Muon's steps to the size of AdamW's, so that one learning rate
    serves both (arXiv 2502.16982); "original" does not.
    betas: of AdamW. eps: of AdamW, and below Muon's norm of a gradient.
    momentum, nesterov, ns_steps (iterations of Newton-Schulz), adjust_lr_fn: of Muon.
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
        # Both check their arguments here, whichever groups there are.
        torch.optim.Muon([torch.zeros(1, 1)], lr, weight_decay, eps=eps, **muon)  # type: ignore[arg-type]
        torch.optim.AdamW([torch.zeros(1)], lr, betas, eps, weight_decay)
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict, which makes new groups and a new state."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Builds the two optimizers over this one's own groups and state: their steps read and write these."""
        muon = [group for group in self.param_groups if group.get("muon")]
        others = [group for group in self.param_groups if not group.get("muon")]
        self._parts: list[Optimizer] = [torch.optim.Muon(muon)] if muon else []
        self._parts += [torch.optim.AdamW(others, fused=True)] if others else []
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both. Returns what `closure` returns, which computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

"""Muon: hidden matrices step by the orthogonal matrix nearest to their momentum.

AdamW scales every weight by itself, as if a matrix were a list of numbers. A matrix turns vectors,
though, and its gradient is dominated by few directions; the others learn slowly. Muon makes all
directions of a step equally long: of the momentum's singular value decomposition U S Vᵀ it takes
U Vᵀ (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). Embeddings, biases and norms
are no such matrices: they stay with AdamW.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from device import choose_dtype
from distributed import Ranks

MOMENTUM = 0.95  # Jordan's
# Of a x + b x³ + c x⁵, which drives singular values from (0, 1] to around 1: Jordan's as well.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ: (n, rows, columns) -> the same, by Newton–Schulz iteration.

    Only matrix products are needed, and bfloat16 is exact enough where the hardware multiplies in
    it, whatever train.dtype is: the result is in it, too. Singular values end between 0.7 and 1.2,
    which is as good as 1 for a step; only those below 0.0015 of the matrix's norm stay smaller.
    """
    a, b, c = COEFFICIENTS
    is_quick = choose_dtype("auto", matrices.device) == torch.bfloat16
    x = matrices.bfloat16() if is_quick else matrices.float()
    is_tall = x.size(-2) > x.size(-1)
    x = x.mT.contiguous() if is_tall else x  # a view would take kernels that round otherwise
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(ITERATIONS):
        squares = x @ x.mT  # (n, rows, rows)
        x = a * x + (b * squares + c * squares @ squares) @ x  # (n, rows, columns)
    return x.mT if is_tall else x


class Muon(torch.optim.AdamW):
    """Muon for the groups with `matrices` = n, AdamW for those without.

    A parameter (n · rows, columns) of such a group is n matrices, one below the other. Beyond
    torch.optim.Muon this takes queries, keys and values apart, skips a step without asking
    the device, and shares the matrices out, so that each rank orthogonalises some of them.
    """

    def __init__(self, groups: list[dict], ranks: Ranks, **settings: object) -> None:
        """`settings` are AdamW's."""
        super().__init__(groups, **settings)
        self.ranks = ranks

    def __setstate__(self, state: dict) -> None:
        """As every optimizer's: AdamW's own would look for its counter in a matrix's state."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters; where `found_inf` (a scalar on the device) is 1, none of them."""
        hidden = [group for group in self.param_groups if "matrices" in group]
        gradients = {parameter: parameter.grad for group in hidden for parameter in group["params"]}
        for parameter in gradients:
            parameter.grad = None  # AdamW leaves those without alone
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        found_inf = getattr(self, "found_inf", torch.zeros((), device=self.ranks.device))
        for group in hidden:
            momenta = [self._momentum(p, found_inf, group["matrices"]) for p in group["params"]]
            rate = group["lr"] * (1 - found_inf)
            kept = 1 - rate * group["weight_decay"]
            for parameter, update in zip(group["params"], self._orthogonal(momenta)):
                rows, columns = update.shape[-2:]
                scale = max(1, rows / columns) ** 0.5  # of tall matrices: Jordan's
                parameter.mul_(kept).sub_(update.view_as(parameter).float() * (rate * scale))

    def _momentum(self, parameter: Tensor, found_inf: Tensor, n: int) -> Tensor:
        """The parameter's momentum, a gradient ahead (Nesterov's): (n, rows, columns)."""
        gradient = torch.where(found_inf > 0, 0.0, parameter.grad)
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        momentum.lerp_(gradient, (1 - MOMENTUM) * (1 - found_inf))
        return gradient.lerp(momentum, MOMENTUM).unflatten(0, (n, -1))

    def _orthogonal(self, momenta: list[Tensor]) -> list[Tensor]:
        """`orthogonalise` all of them, those of one shape at once and shared out over the ranks."""
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for place, momentum in enumerate(momenta):
            by_shape[momentum.shape].append(place)
        updates: dict[int, Tensor] = {}
        for (n, *_), places in by_shape.items():
            matrices = [matrix for place in places for matrix in momenta[place]]
            share = -(-len(matrices) // self.ranks.world_size)  # rounded up
            mine = matrices[self.ranks.rank * share :][:share]
            mine += [torch.zeros_like(matrices[0])] * (share - len(mine))
            orthogonal = self.ranks.gather(orthogonalise(torch.stack(mine)))
            updates.update(zip(places, orthogonal.split(n)))
        return [updates[place] for place in range(len(momenta))]

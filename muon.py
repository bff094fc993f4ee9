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

from common.device import choose_dtype
from distributed import Ranks

MOMENTUM = 0.95  # Jordan's
# Of a x + b x³ + c x⁵, which drives singular values from (0, 1] to around 1: Jordan's as well.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def quick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies in it, else float32."""
    is_quick = choose_dtype("auto", device) == torch.bfloat16
    return torch.bfloat16 if is_quick else torch.float32


def orthogonalise(matrices: Tensor) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ: (n, rows, columns) -> the same, by Newton–Schulz iteration.

    Only matrix products are needed, and `quick_dtype` is exact enough for them, whatever
    train.dtype is: the result is in it, too. Singular values end between 0.7 and 1.2, which is as
    good as 1 for a step; only those below 0.0015 of the matrix's norm stay smaller.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(quick_dtype(matrices.device))
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
            rate = group["lr"] * (1 - found_inf)
            kept = 1 - rate * group["weight_decay"]
            for parameters in of_one_shape(group["params"]):
                updates = self._updates(parameters, group["matrices"], found_inf)
                for parameter, update in zip(parameters, updates):
                    rows, columns = update.shape[-2:]
                    scale = max(1, rows / columns) ** 0.5  # of tall matrices: Jordan's
                    parameter.mul_(kept).sub_(update.view_as(parameter).float() * (rate * scale))

    def _updates(self, parameters: list[Tensor], n: int, found_inf: Tensor) -> tuple[Tensor, ...]:
        """The updates to subtract from the parameters, all of one shape: (n, rows, columns) each.

        It is their momentum, a gradient ahead (Nesterov's), made orthogonal: by this rank for its
        share of the matrices, by the others for theirs.
        """
        matrices = []  # (gradient, momentum) of each
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            gradient.masked_fill_(found_inf > 0, 0.0)
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, (1 - MOMENTUM) * (1 - found_inf))
            matrices += zip(gradient.unflatten(0, (n, -1)), state["momentum"].unflatten(0, (n, -1)))
        share = -(-len(matrices) // self.ranks.world_size)  # rounded up
        mine = matrices[self.ranks.rank * share : (self.ranks.rank + 1) * share]
        ahead = torch.zeros(
            (share, *matrices[0][0].shape),
            dtype=quick_dtype(self.ranks.device),
            device=self.ranks.device,
        )
        for place, (gradient, momentum) in zip(ahead, mine):
            place.copy_(gradient.lerp(momentum, MOMENTUM))
        return self.ranks.gather(orthogonalise(ahead)).split(n)


def of_one_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    """The parameters, those of one shape together."""
    groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.shape].append(parameter)
    return list(groups.values())

"""SGD and learning-rate schedules.

SGD is written here, not taken from torch.optim: the whole update is three fused calls, and importing torch.optim's
wrapper pulls in the compiler, which costs each stage more time than a small training takes.
"""

import math

import torch
from torch import Tensor

from tailcal.method import ParameterGroup
from tailcal.params import MultiStep, Recipe


class SGD:
    """SGD with momentum and coupled weight decay (PyTorch's convention):

    g <- grad + weight_decay w;  v <- momentum v + g;  w <- w - lr v
    """

    def __init__(self, groups: list[ParameterGroup], momentum: float, weight_decay: float):
        self.groups, self.momentum, self.weight_decay = groups, momentum, weight_decay
        self.velocities = [[torch.zeros_like(p) for p in group.parameters] for group in groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the gradients in `.grad`, at base learning rate `lr`."""
        for group, velocity in zip(self.groups, self.velocities, strict=True):
            gradient = torch._foreach_add([p.grad for p in group.parameters], group.parameters, alpha=self.weight_decay)
            torch._foreach_mul_(velocity, self.momentum)
            torch._foreach_add_(velocity, gradient)
            torch._foreach_add_(group.parameters, velocity, alpha=-lr * group.lr_factor)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    def state(self) -> list[list[Tensor]]:
        """What a checkpoint must hold."""
        return self.velocities

    @torch.no_grad()
    def load_state(self, state: list[list[Tensor]]) -> None:
        """Take over a saved state, in place."""
        for mine, saved in zip(self.velocities, state, strict=True):
            torch._foreach_copy_(mine, saved)


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0.

    Warm-up: epoch e of 1..w uses e / w of lr. Multi-step: times gamma for each milestone that lies at or before the
    epoch (milestone 160 acts from the 161st epoch on, which is number 160 here). Cosine: over the epochs after the
    warm-up, from lr at the first towards 0, which it would reach one epoch after the last.
    """
    schedule = recipe.schedule
    if epoch < schedule.warmup_epochs:
        return recipe.lr * (epoch + 1) / schedule.warmup_epochs
    if isinstance(schedule, MultiStep):
        return recipe.lr * schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
    progress = (epoch - schedule.warmup_epochs) / (recipe.epochs - schedule.warmup_epochs)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))

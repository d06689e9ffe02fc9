"""SGD, SAM around it, and learning-rate schedules.

SGD is called here by its kernel: the whole update is one fused call, and constructing an optimiser of torch.optim
imports the compiler, which costs each stage more time than a small training takes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tailcal.method import ParameterGroup
from tailcal.params import MultiStep, Recipe

Loss = Callable[[], tuple[Tensor, Tensor]]  # runs the network; returns the loss and the logits


class SGD:
    """SGD with momentum and coupled weight decay (PyTorch's convention):

    g <- grad + weight_decay w;  v <- momentum v + g;  w <- w - lr v
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        momentum: float,
        weight_decay: float,
        after_backward: Callable[[], None] = lambda: None,
    ):
        """after_backward: called once each gradient is there, before it is used (several processes sum theirs)."""
        self.groups, self.momentum, self.weight_decay = groups, momentum, weight_decay
        self.after_backward = after_backward
        self.velocities = [[torch.zeros_like(p) for p in group.parameters] for group in groups]

    def step(self, lr: Tensor, loss: Loss, ascent: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """One update at base learning rate `lr`, a float32 scalar.

        Returns the loss and the logits that it was made from, detached.
        `ascent` is not called: it is there so that every optimiser is stepped in the same way.
        """
        del ascent
        value, logits = loss()
        self._backward(value)
        self._update(lr)
        return value.detach(), logits.detach()

    def _backward(self, value: Tensor) -> None:
        """Give every parameter the gradient of this loss alone, in the place of that of the pass before."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None
        value.backward()
        self.after_backward()

    @torch.no_grad()
    def _update(self, lr: Tensor) -> None:
        for group, velocity in zip(self.groups, self.velocities, strict=True):
            torch._fused_sgd_(
                group.parameters,
                [p.grad for p in group.parameters],
                velocity if self.momentum else [],  # without momentum the kernel takes none
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                lr=lr * group.lr_factor,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )

    def state(self) -> list[list[Tensor]]:
        """What a checkpoint must hold."""
        return self.velocities

    @torch.no_grad()
    def load_state(self, state: list[list[Tensor]]) -> None:
        """Take over a saved state, in place."""
        for mine, saved in zip(self.velocities, state, strict=True):
            torch._foreach_copy_(mine, saved)


class SAM(SGD):
    """Sharpness-aware minimisation (Foret et al. 2021, algorithm 1) around SGD:

    e = rho g / ||g||, g the gradient at w over all parameters together;  then SGD from w with the gradient at w + e

    Batch norm's running statistics follow both passes, as in the released codes.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        momentum: float,
        weight_decay: float,
        rho: float,
        after_backward: Callable[[], None] = lambda: None,
    ):
        super().__init__(groups, momentum, weight_decay, after_backward)
        self.rho = rho

    def step(self, lr: Tensor, loss: Loss, ascent: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """One update: climb the gradient of `ascent()` by rho, and descend with the gradient of `loss()` there."""
        self._backward(ascent())
        with torch.no_grad():
            # A parameter that the ascent loss does not reach has no gradient, and stays where it is.
            climbing = [p for group in self.groups for p in group.parameters if p.grad is not None]
            before = torch._foreach_mul(climbing, 1.0)  # copies of all at once, where a clone each is a launch each
            gradient = [p.grad for p in climbing]
            norm = torch.stack(torch._foreach_norm(gradient)).norm()
            torch._foreach_add_(climbing, torch._foreach_mul(gradient, self.rho / (norm + 1e-12)))
        value, logits = loss()
        self._backward(value)
        with torch.no_grad():
            torch._foreach_copy_(climbing, before)  # exactly w: subtracting e again would round
        self._update(lr)
        return value.detach(), logits.detach()


def optimiser(groups: list[ParameterGroup], recipe: Recipe, after_backward: Callable[[], None] = lambda: None) -> SGD:
    """The optimiser that the recipe asks for."""
    if recipe.sam_rho:
        return SAM(groups, recipe.momentum, recipe.weight_decay, recipe.sam_rho, after_backward)
    return SGD(groups, recipe.momentum, recipe.weight_decay, after_backward)


def learning_rate(recipe: Recipe, spent: int) -> float:
    """The learning rate once `spent` of the recipe's epochs (or iterations) have been spent.

    Warm-up over w: linear from warmup_lr at 0 to lr at w - 1; where w is 1, warmup_lr at 0. (An epoch e of 1..w that
    uses e / w of lr, as in MiSLAS, is a warmup_lr of lr / w.) Multi-step: times gamma for each milestone that has been
    spent. Cosine: over what follows the warm-up, from lr at its first epoch towards 0, which it would reach one epoch
    after the last.
    """
    schedule = recipe.schedule
    if spent < schedule.warmup:
        return schedule.warmup_lr + (recipe.lr - schedule.warmup_lr) * spent / max(schedule.warmup - 1, 1)
    if isinstance(schedule, MultiStep):
        return recipe.lr * schedule.gamma ** sum(spent >= milestone for milestone in schedule.milestones)
    progress = (spent - schedule.warmup) / (recipe.budget - schedule.warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))

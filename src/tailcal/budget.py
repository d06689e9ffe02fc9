"""How long a recipe trains on so many images: its epochs in steps, and what each of them begins with."""

import math
from dataclasses import dataclass

from tailcal import distributed
from tailcal.errors import UserError
from tailcal.optim import learning_rate
from tailcal.params import Recipe


@dataclass(frozen=True)
class Budget:
    """A recipe on so many training images. Every batch is full; `tailcal.samplers` says what fills the last one."""

    recipe: Recipe
    images: int

    @property
    def steps(self) -> int:
        """Steps of an epoch: ceil(N / B), or floor(N / B) for recipes that drop the last partial batch."""
        size = self.recipe.batch_size
        return self.images // size if self.recipe.last_batch == "drop" else math.ceil(self.images / size)

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return self.recipe.iterations or self.recipe.epochs * self.steps

    @property
    def epochs(self) -> int:
        """How many there are. A budget of iterations may end within the last of them."""
        return math.ceil(self.total / self.steps)

    def stretch(self, epoch: int) -> tuple[int, int]:
        """Where in the samplers' streams the images of an epoch (counted from 0) begin and end: positions, the end
        exclusive."""
        size = self.recipe.batch_size
        return epoch * self.steps * size, min((epoch + 1) * self.steps, self.total) * size

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0: it changes as one begins."""
        return learning_rate(self.recipe, epoch if self.recipe.epochs else epoch * self.steps)

    def require_possible(self, key: str | None, title: str) -> None:
        """Raise UserError when batches cannot be drawn from so many images, or not shared among processes, or when a
        change of the learning rate falls into the last epoch, which has begun by then.

        key: the recipe's, and title: the training's, for the message.
        """
        size, recipe = self.recipe.batch_size, self.recipe
        if size > self.images:
            raise UserError(
                f"{key}.batch_size is {size}, but the training split has {self.images} images "
                f"({title}): use {self.images} or fewer"
            )
        if size % distributed.size():
            raise UserError(
                f"{key}.batch_size is {size}, which {distributed.size()} processes cannot share evenly "
                f"({title}): use a multiple of {distributed.size()}"
            )
        if recipe.iterations:
            last = (recipe.iterations - 1) // self.steps * self.steps
            marks = [recipe.schedule.warmup, *getattr(recipe.schedule, "milestones", [])]
            if late := [mark for mark in marks if last < mark < recipe.iterations]:
                raise UserError(
                    f"{key}.schedule: warmup or milestones say {late[0]}, and the learning rate changes as "
                    f"an epoch of {self.steps} iterations begins, the last at {last} ({title}): must be {last} or less"
                )

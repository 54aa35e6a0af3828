"""The optimiser Adam (Kingma and Ba 2015), for what `tune` finds: it takes arrays of numpy and tensors of torch."""

from dataclasses import dataclass
from typing import Any, TypeVar

Values = TypeVar("Values")


@dataclass(slots=True)
class Adam:
    """The state of one array of numbers, with decay rates of 0.9 and 0.999, and ε = 1e-8."""

    lr: float
    steps: int = 0
    first: Any = 0.0
    second: Any = 0.0

    def change(self, gradient: Values) -> Values:
        """Return what to add to the numbers, in the type of the gradient, whose shape is the same in every step."""
        given: Any = gradient
        self.steps += 1
        self.first = self.first + 0.1 * (given - self.first)
        self.second = self.second + 0.001 * (given**2 - self.second)
        size = (self.second / (1 - 0.999**self.steps)) ** 0.5 + 1e-8
        found: Values = -self.lr * self.first / (1 - 0.9**self.steps) / size
        return found

"""The optimiser Adam (Kingma and Ba 2015), for the few numbers that `tune` finds."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Adam:
    """The state of one array of numbers, with decay rates of 0.9 and 0.999, and ε = 1e-8."""

    lr: float
    steps: int = 0
    first: np.ndarray = field(default_factory=lambda: np.zeros(()))
    second: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def change(self, gradient: np.ndarray) -> np.ndarray:
        """Return what to add to the numbers. gradient: float64, of the same shape in every step."""
        self.steps += 1
        self.first = self.first + 0.1 * (gradient - self.first)
        self.second = self.second + 0.001 * (gradient**2 - self.second)
        size = np.sqrt(self.second / (1 - 0.999**self.steps)) + 1e-8
        found: np.ndarray = -self.lr * self.first / (1 - 0.9**self.steps) / size
        return found

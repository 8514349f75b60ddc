"""How often each data set is drawn: p proportional to size ** temperature times a hand weight.

The paper (section 2.4) takes the square root of the size and then adjusts a few sets by hand.
"""

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class MixtureRow:
    """One line of the table printed before training."""

    name: str
    size: int
    weight: float
    probability: float
    epochs: float


@dataclass(frozen=True)
class Mixture:
    """Probabilities of data sets. ``temperature`` 1 is proportional to size, 0 is uniform.

    A weight of 0 leaves a set out; a weight for an unknown set is an error.
    """

    sizes: dict[str, int]
    weights: dict[str, float] = field(default_factory=dict)
    temperature: float = 0.5

    def __post_init__(self) -> None:
        for name in self.weights:
            if name not in self.sizes:
                known = ", ".join(self.sizes)
                raise ValueError(f"weight for '{name}', which is not in the mixture: {known}")
        for name, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"data set '{name}' is empty; remove it from the mixture")
            if not self.weight(name) >= 0:
                raise ValueError(f"weight of '{name}' is {self.weight(name)}; expected 0 or more")
        if not any(self.weight(name) for name in self.sizes):
            raise ValueError("the mixture has no data set with a weight above 0")

    def weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)

    @property
    def probabilities(self) -> dict[str, float]:
        """By name, in the order of ``sizes``; they sum to 1."""
        raw = {name: n**self.temperature * self.weight(name) for name, n in self.sizes.items()}
        total = sum(raw.values())
        return {name: value / total for name, value in raw.items()}

    def table(self, num_samples: int) -> tuple[MixtureRow, ...]:
        """What ``num_samples`` draws amount to; ``epochs`` is how often each example is seen."""
        return tuple(
            MixtureRow(name, size, self.weight(name), p, p * num_samples / size)
            for (name, size), p in zip(self.sizes.items(), self.probabilities.values(), strict=True)
        )

    def choose(self, rng: random.Random) -> str:
        """One independent draw. (The loader shares its slots out evenly instead: ``order.py``.)"""
        probabilities = self.probabilities
        return rng.choices(list(probabilities), list(probabilities.values()))[0]

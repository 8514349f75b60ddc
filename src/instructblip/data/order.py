"""Which data set and which example stand at slot n of training: a function of (seed, n) alone.

``Mixture`` says how often each set is drawn, ``Order`` in which order. Slot n is the n-th sample of
training. Slots are dealt in cycles of ``CYCLE``:

1. A set owns a fixed number of the places 0 .. CYCLE - 1, its share: its probability times
   ``CYCLE``, rounded. The first set owns the first places, the second the next, and so on.
2. A permutation with a key from (seed, cycle) sends the slot to a place, so sets alternate at
   random while every cycle holds exactly each set's share.
3. Cycles before times share, plus the place within the share, numbers the draws of one set
   0, 1, 2, ... without gaps. Divided by the size of the set, the quotient is the epoch, and the
   remainder goes through a permutation with a key from (seed, set, epoch) to an example.

Example with CYCLE = 4 and shares (3, 1): if the permutation of cycle 5 sends slot 4 * 5 + 2 to
place 1, that slot is draw 5 * 3 + 1 = 16 of set 0; with 10 examples in the set, it is draw 6 of
epoch 1.

Every set is visited evenly, each slot takes constant time, and there is no state: a run resumes by
asking for a later slot.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

CYCLE = 4096
_MASK = (1 << 64) - 1


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
    """Probabilities of data sets, proportional to size ** ``temperature`` times a hand weight.

    The paper (section 2.4) takes the square root of the size and adjusts a few sets by hand. A
    ``temperature`` of 1 is proportional to size, 0 is uniform. A weight of 0 leaves a set out; sets
    without one have weight 1. Raises ValueError for an unknown set, an empty set, a negative
    weight, and when no weight is above 0.
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
        """Each set in ``num_samples`` draws; ``epochs`` is how often each example is seen."""
        return tuple(
            MixtureRow(name, size, self.weight(name), p, p * num_samples / size)
            for (name, size), p in zip(self.sizes.items(), self.probabilities.values(), strict=True)
        )


@dataclass(frozen=True, slots=True)
class Draw:
    """``dataset`` is an index into the sets, ``example`` an index into that set."""

    dataset: int
    example: int


class Order:
    """``order[n]`` is the ``Draw`` of slot n, for data sets of these sizes and probabilities."""

    def __init__(self, sizes: list[int], probabilities: list[float], seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.shares = share_out(probabilities, CYCLE)
        self._starts = [0, *accumulate(self.shares)]

    def __getitem__(self, slot: int) -> Draw:
        cycle, place = divmod(slot, CYCLE)
        place = permute(place, CYCLE, mix(self.seed, 1, cycle))
        dataset = bisect_right(self._starts, place) - 1
        number = cycle * self.shares[dataset] + place - self._starts[dataset]
        epoch, rest = divmod(number, self.sizes[dataset])
        key = mix(self.seed, 2, dataset, epoch)
        return Draw(dataset, permute(rest, self.sizes[dataset], key))


def share_out(probabilities: list[float], slots: int) -> list[int]:
    """Integers that sum to ``slots``, nearest to the probabilities times ``slots`` (largest
    remainder); at least 1 for every probability above 0."""
    exact = [p * slots for p in probabilities]
    shares = [
        int(x) if p == 0 else max(1, int(x)) for x, p in zip(exact, probabilities, strict=True)
    ]
    order = sorted(range(len(exact)), key=lambda i: exact[i] - shares[i], reverse=True)
    missing = slots - sum(shares)
    for k in range(abs(missing)):
        if missing > 0:
            shares[order[k % len(order)]] += 1
        else:
            shares[max(range(len(shares)), key=shares.__getitem__)] -= 1
    return shares


def permute(index: int, size: int, key: int) -> int:
    """The image of ``index`` under a permutation of range(size) chosen by ``key``.

    A Feistel network: ``index`` is split into two halves of equal bits, and each of four rounds
    replaces (left, right) by (right, left xor f(right)). A round can be undone whatever f is, so
    the network permutes the numbers of that many bits. They may exceed ``size``; a result that does
    is permuted again until it does not ("cycle walking"), which keeps the map one to one.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for r in range(4):
            left, right = right, left ^ (_scramble(right ^ key ^ (r << 60)) & low)
        index = left << half | right
        if index < size:
            return index


def mix(*values: int) -> int:
    """A hash of integers in 64 bits, the same in every process and on every machine."""
    state = 0x243F6A8885A308D3
    for value in values:
        state = _scramble(state ^ (value & _MASK))
    return state


def _scramble(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)

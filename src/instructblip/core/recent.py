"""Values that were used lately, up to a number of bytes."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Sized(Protocol):
    """Anything that knows its bytes: an array, a tensor."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Recent(Generic[T]):
    """Keeps the values that were used last, of ``limit`` bytes in all; a larger one is not kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.values: OrderedDict[Hashable, T] = OrderedDict()
        self.nbytes = 0

    def get(self, key: Hashable) -> T | None:
        if key in self.values:
            self.values.move_to_end(key)
        return self.values.get(key)

    def put(self, key: Hashable, value: T) -> None:
        """Keep a value of a new key, and forget those that were not used for longest."""
        if value.nbytes > self.limit:
            return
        self.values[key] = value
        self.nbytes += value.nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self.values.popitem(last=False)[1].nbytes

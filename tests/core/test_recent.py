"""What was used last stays, up to a number of bytes."""

import numpy as np

from instructblip.core.recent import Recent


def test_the_values_used_last_stay() -> None:
    recent: Recent[np.ndarray] = Recent(30)
    for key in "abc":
        recent.put(key, np.zeros(10, dtype=np.uint8))
    assert recent.get("a") is not None
    recent.put("d", np.zeros(10, dtype=np.uint8))
    assert [key for key in "abcd" if recent.get(key) is not None] == ["a", "c", "d"]
    recent.put("large", np.zeros(31, dtype=np.uint8))
    assert recent.get("large") is None
    assert recent.get("a") is not None
    recent.put("e", np.zeros(25, dtype=np.uint8))
    assert [key for key in "abcde" if recent.get(key) is not None] == ["e"]

"""pydantic's errors in one line."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


def problem(detail: Mapping[str, Any]) -> str:
    """One of the errors: the key, what it expects, what it got; or our own message."""
    message = detail["msg"].removeprefix("Value error, ")
    key = ".".join(map(str, detail["loc"]))
    got = "" if isinstance(detail["input"], dict) else f" (got {detail['input']!r})"
    return f"{key}: {message}{got}" if key else message


def problems(error: "ValidationError") -> str:
    """All of them."""
    return "; ".join(map(problem, error.errors()))

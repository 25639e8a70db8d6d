"""Limits of option values, the same for dataclasses and for the command line."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

from models.utils.errors import UserError

LARGEST_INTEGER = 2**63 - 1  # the largest int64, and the largest seed (see ``cca.random_streams``)


@dataclass(frozen=True)
class Limits:
    """Limits of a finite number: at least ``low``, at most ``high`` (None: no upper limit).

    kind: int or float. Integers are at most LARGEST_INTEGER in any case.
    above: the number must be above ``low``, not equal to it.
    """

    low: float
    high: float | None = None
    kind: type = float
    above: bool = False

    def problem(self, value: Any) -> str | None:
        """Return the limit that a value breaks, such as "must be at least 1"; None if it is allowed."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.kind is int else Real):
            return f"must be {'an integer' if self.kind is int else 'a number'}"
        number, high = self.kind(value), math.inf if self.high is None else self.high
        conditions = [f"above {self.low:g}" if self.above else f"at least {self.low:g}"]
        if self.high is not None:
            conditions.append(f"at most {self.high:g}")
        if self.kind is int and number > LARGEST_INTEGER:
            conditions.append(f"at most {LARGEST_INTEGER}")
        elif not math.isfinite(number):
            conditions.append("finite")
        elif self.low <= number <= high and not (self.above and number == self.low):
            return None
        return f"must be {' and '.join(conditions)}"


class Limited:
    """Base of a dataclass whose fields are checked: numbers against ``Limits``, texts against allowed names.

    None is allowed if a field's type includes it. Raises UserError for values that are not allowed.
    """

    limits: ClassVar[Mapping[str, Limits | Collection[str]]]

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value, allowed = getattr(self, field.name), self.limits.get(field.name)
            if allowed is None or (value is None and isinstance(None, field.type)):  # type: ignore[arg-type]
                continue
            if isinstance(allowed, Limits):
                problem = allowed.problem(value)
            else:
                problem = None if value in list(allowed) else f"must be one of {', '.join(allowed)}"
            if problem:
                raise UserError(f"{field.name}: {value!r} {problem}")

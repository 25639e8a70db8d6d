"""Which values an option may have: the same limits for a dataclass and for the command line."""

import math
import numbers
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from models.utils.errors import UserError

LARGEST_INTEGER = 2**63 - 1  # what a tensor holds, and what a seed may be (see ``cca.random_streams``)


@dataclass(frozen=True)
class Limits:
    """Limits of a finite number: from ``low`` (or above it) to ``high`` (None: no upper limit).

    kind: int or float. Integers end at LARGEST_INTEGER in any case.
    """

    low: float
    high: float | None = None
    kind: type = float
    above: bool = False

    def problem(self, value: Any) -> str | None:
        """Return what a value must be instead, such as "must be at least 1"; None where it is allowed."""
        kind: Any = numbers.Integral if self.kind is int else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"must be {'an integer' if self.kind is int else 'a number'}"
        wanted = [f"above {self.low:g}" if self.above else f"at least {self.low:g}"]
        if self.high is not None:
            wanted.append(f"at most {self.high:g}")
        inside = (self.low < value if self.above else self.low <= value) and (
            self.high is None or value <= self.high
        )
        if self.kind is int and value > LARGEST_INTEGER:
            wanted.append(f"at most {LARGEST_INTEGER}")
        elif not math.isfinite(value):
            wanted.append("finite")
        elif inside:
            return None
        return f"must be {' and '.join(wanted)}"


def check_fields(options: Any, limits: Mapping[str, Limits | Collection[str]]) -> None:
    """Raise UserError for a field of a dataclass that is outside its limits, or none of the names allowed.

    None is allowed where the field's type says so.
    """
    for field in fields(options):
        value, allowed = getattr(options, field.name), limits.get(field.name)
        if allowed is None or (value is None and isinstance(None, field.type)):  # type: ignore[arg-type]
            continue
        if isinstance(allowed, Limits):
            problem = allowed.problem(value)
        else:
            problem = None if value in list(allowed) else f"must be one of {', '.join(allowed)}"
        if problem:
            raise UserError(f"{field.name}: {value!r} {problem}")

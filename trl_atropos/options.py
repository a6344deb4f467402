"""How an option declares what it takes: `choices` in the metadata of its field, a range in its type.

The options of a run are dataclasses, one a package (`data/options.py`, `loss/options.py`, ...), and `AtroposConfig` is all of
them. Each travels whole to the code that acts on it.
"""

from __future__ import annotations

from inspect import get_annotations
from typing import Annotated, Any, get_type_hints


POSITIVE = "positive"
"""Mark in an annotation: the value must be above 0."""

PositiveFloat = Annotated[float, POSITIVE]
PositiveInt = Annotated[int, POSITIVE]


def check_declared(options: object, declared_by: type) -> None:
    """Refuse values that are not what the fields in the body of the dataclass `declared_by` declare.

    `options` is an instance of that class, or of one that inherits from it.

    Raises:
        ValueError: naming option, value, and what it may be.
    """
    own = get_annotations(declared_by)
    hints = get_type_hints(declared_by, include_extras=True)
    for name, field in getattr(declared_by, "__dataclass_fields__", {}).items():
        if name not in own:
            continue
        value: Any = getattr(options, name)
        choices = field.metadata.get("choices")
        if choices is not None and value not in choices:
            raise ValueError(f"{name} is {value!r}. Choose one of: {', '.join(choices)}.")
        # Written so that NaN is refused too.
        if POSITIVE in getattr(hints[name], "__metadata__", ()) and not value > 0:
            raise ValueError(f"{name} is {value}, it must be positive. Set --{name}.")

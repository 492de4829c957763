"""Checks of one value. Those of a setting raise UserError with one line that names the key and the value."""

import math
from collections.abc import Iterable
from typing import Any

from rwkv_pl.errors import UserError


def check_kinds(prefix: str, given: Any, default: Any) -> None:
    """Require that a value has the type of its YAML default; a null default accepts any plain value."""
    if isinstance(given, dict) and isinstance(default, dict):
        for key, value in given.items():
            if key in default:
                check_kinds(f"{prefix}.{key}", value, default[key])
    elif default is not None:
        check_kind(prefix, given, (type(default),))


def check_kind(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Require that a value has one of the types. An int counts as a float; a bool does not count as an int."""
    wanted = kinds + ((int,) if float in kinds else ())
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, wanted):
        names = " or ".join(KIND_NAMES[kind] for kind in kinds)
        raise UserError(f"{name} must be {names}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value}")


KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "a mapping",
}


def to_plain(value: Any) -> Any:
    """Convert a number of numpy or torch to Python's, which a checkpoint can hold; any other value stays."""
    if isinstance(value, list | tuple):
        return type(value)(map(to_plain, value))
    return value.item() if getattr(value, "shape", None) == () else value


def make_plain(settings: Any) -> None:
    """Apply `to_plain` to each attribute of `settings`."""
    for name, value in vars(settings).items():
        setattr(settings, name, to_plain(value))


def suggest_key(key: str, keys: Any) -> str:
    """Return "; did you mean ...?" if one of `keys` resembles `key`, else a list of the keys."""
    from difflib import get_close_matches

    close = get_close_matches(key, list(keys), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; available: {', '.join(map(str, keys))}"


def suggest_flag(message: str, flags: Iterable[str]) -> str:
    """Return "did you mean --FLAG?" if argparse's `message` names an unknown flag like one of `flags`, else ""."""
    from difflib import get_close_matches

    words = [word.partition("=")[0] for word in message.partition("unrecognized arguments: ")[2].split()]
    close = [
        match
        for word in words
        if word.startswith("--")
        for match in get_close_matches(word, list(flags), n=1, cutoff=0.75)
    ]
    return f"did you mean {close[0]}?" if close else ""


def check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError if `value` is not in `allowed`."""
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_at_least(name: str, value: float, lowest: float) -> None:
    """Raise UserError if `value` is below `lowest`, or not finite."""
    if not (math.isfinite(value) and value >= lowest):
        raise UserError(f"{name} must be at least {lowest}, got {value}")


def check_above(name: str, value: float, bound: float) -> None:
    """Raise UserError if `value` is not above `bound`, or not finite."""
    if not (math.isfinite(value) and value > bound):
        raise UserError(f"{name} must be a finite number above {bound}, got {value}")


def check_tokens(lowest: int, highest: int, size: int) -> None:
    """Raise IndexError unless the tokens from `lowest` to `highest` are in [0, size)."""
    if lowest < 0 or highest >= size:
        raise IndexError(f"tokens must be from 0 to {size - 1}, got {lowest if lowest < 0 else highest}")


def check_between(name: str, value: float, lowest: float, bound: float, inclusive: bool = False) -> None:
    """Raise UserError if `value` is outside of [lowest, bound), or of [lowest, bound] if inclusive."""
    if not (lowest <= value < bound or (inclusive and value == bound)):
        raise UserError(f"{name} must be from {lowest} to {'' if inclusive else 'below '}{bound}, got {value}")

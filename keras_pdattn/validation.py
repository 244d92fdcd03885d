"""Checks of arguments, raised early and worded the same on every backend."""

import numbers


def positive_int(name, value):
    """Returns `value` if it is an integer above zero (and not a bool)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value <= 0:
        raise ValueError(
            f"Received an invalid value for argument `{name}`, expected a "
            f"positive integer. Received: {name}={value!r}"
        )
    return int(value)


def positive_odd_int(name, value):
    """Returns `value` if it is an odd integer above zero (and not a bool)."""
    if positive_int(name, value) % 2 == 0:
        raise ValueError(
            f"Received an invalid value for argument `{name}`, expected an odd "
            f"integer. Received: {name}={value!r}"
        )
    return int(value)


def natural(name, value):
    """Returns `value` if it is an integer, zero or more (and not a bool)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(
            f"Received an invalid value for argument `{name}`, expected a "
            f"non-negative integer. Received: {name}={value!r}"
        )
    return int(value)


def real(name, value, expected, accepts):
    """Returns `value` as a float if it is a real number that `accepts` takes."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real or not accepts(value):
        raise ValueError(
            f"Received an invalid value for argument `{name}`, expected "
            f"{expected}. Received: {name}={value!r}"
        )
    return float(value)


def positive(name, value, expected="a positive number"):
    """Returns `value` as a float if it is a finite number above zero."""
    return real(name, value, expected, lambda number: 0 < number < float("inf"))


def dropout_rate(name, value):
    """Returns `value` as a float if it is a share of entries that can be dropped."""
    return real(name, value, "a number in [0, 1)", lambda rate: 0 <= rate < 1)


def boolean(name, value):
    """Returns `value` if it is a Python bool."""
    if not isinstance(value, bool):
        raise ValueError(
            f"Received an invalid value for argument `{name}`, expected a "
            f"bool. Received: {name}={value!r}"
        )
    return value


def axes(name, value):
    """Returns `value` if it is an integer, or some of them."""
    several = value if isinstance(value, (tuple, list)) else (value,)
    if not several or any(
        isinstance(axis, bool) or not isinstance(axis, numbers.Integral) for axis in several
    ):
        raise ValueError(
            f"Received an invalid value for argument `{name}`, expected an integer or a non-empty "
            f"sequence of integers. Received: {name}={value!r}"
        )
    return value

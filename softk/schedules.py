"""Schedules of epsilon or k over the steps of a training: from a start to an end.

A schedule is a function of the step. The step is a number, or an array of any library: a traced one under a compiler,
or several steps at once. Before step 0 and after the last step it has its first and its last value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ._functions.checks import check_count, is_number, kind_of
from ._functions.signatures import explained
from .backend import backend_of, is_array

__all__ = ["Schedule", "constant", "cosine", "exponential", "linear"]


@dataclass(frozen=True)
class Schedule:
    """A function of the step, made by `constant`, `linear`, `cosine` or `exponential`.

    Attributes
    ----------
    kind : str
        The name of the function that made it.
    start, end : float
        The first and the last value.
    steps : int
        The step at which the last value is reached.
    """

    kind: str
    start: float
    end: float
    steps: int

    def __call__(self, step: Any) -> Any:
        """The value at a step: a float for a number, an array of floats for an array."""
        if is_number(step):
            part: Any = min(max(step / self.steps, 0.0), 1.0)
            return _CURVES[self.kind](self.start, self.end, part, math.cos)
        if not is_array(step):
            raise TypeError(f"step must be a number or an array, got {kind_of(step)}")
        xp = backend_of(step).xp
        if not xp.isdtype(step.dtype, ("integral", "real floating")):
            raise TypeError(f"step must be real, got dtype {step.dtype}")
        if xp.isdtype(step.dtype, "integral"):
            step = xp.astype(step, xp.__array_namespace_info__().default_dtypes()["real floating"])
        part = step / self.steps
        part = xp.where(part > 0.0, part, xp.zeros_like(part))
        part = xp.where(part < 1.0, part, xp.ones_like(part))
        return _CURVES[self.kind](self.start, self.end, part, xp.cos)


def _linear(start: float, end: float, part: Any, cos: Callable[[Any], Any]) -> Any:
    return (1.0 - part) * start + part * end


def _cosine(start: float, end: float, part: Any, cos: Callable[[Any], Any]) -> Any:
    share = 0.5 * (1.0 + cos(math.pi * part))
    return share * start + (1.0 - share) * end


def _exponential(start: float, end: float, part: Any, cos: Callable[[Any], Any]) -> Any:
    return start ** (1.0 - part) * end**part  # the powers are exact at both ends


_CURVES = {"constant": _linear, "linear": _linear, "cosine": _cosine, "exponential": _exponential}


def _schedule(kind: str, start: Any, end: Any, steps: Any) -> Schedule:
    for name, value in (("value", start),) if kind == "constant" else (("start", start), ("end", end)):
        if not is_number(value):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value) or (kind == "exponential" and value <= 0.0):
            wanted = "positive and finite" if kind == "exponential" else "finite"
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return Schedule(kind, float(start), float(end), check_count("steps", steps))


@explained
def constant(value: float, /) -> Schedule:
    """The same value at every step.

    Parameters
    ----------
    value : float
        The value. Finite.

    Returns
    -------
    Schedule
        ``schedule(step)`` is the value, an array of it for an array of steps.

    Raises
    ------
    TypeError, ValueError
        If `value` is not a finite number.

    Examples
    --------
    >>> import softk
    >>> softk.schedules.constant(0.1)(7)
    0.1
    """
    return _schedule("constant", value, value, 1)


@explained
def linear(start: float, end: float, /, *, steps: int) -> Schedule:
    """A straight line: each step adds the same.

    Parameters
    ----------
    start, end : float
        The value at step 0, and from step `steps` on. Finite.
    steps : int
        The step at which the end is reached, at least 1.

    Returns
    -------
    Schedule
        A function of the step.

    Raises
    ------
    TypeError, ValueError
        If `start` or `end` is not a finite number, or `steps` not an integer of at least 1.

    Examples
    --------
    A budget that shrinks from all of 64 items to 8:

    >>> import softk
    >>> k = softk.schedules.linear(64, 8, steps=100)
    >>> k(0), k(50), k(100), k(1000)
    (64.0, 36.0, 8.0, 8.0)
    """
    return _schedule("linear", start, end, steps)


@explained
def cosine(start: float, end: float, /, *, steps: int) -> Schedule:
    """Half a period of a cosine: slow at both ends.

    Parameters
    ----------
    start, end, steps
        As for `linear`.

    Returns
    -------
    Schedule
        A function of the step.

    Raises
    ------
    TypeError, ValueError
        As `linear`.

    References
    ----------
    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, equation (5).

    Examples
    --------
    >>> import softk
    >>> epsilon = softk.schedules.cosine(1.0, 0.1, steps=100)
    >>> epsilon(0), round(epsilon(25), 3), round(epsilon(50), 3), epsilon(100)
    (1.0, 0.868, 0.55, 0.1)
    """
    return _schedule("cosine", start, end, steps)


@explained
def exponential(start: float, end: float, /, *, steps: int) -> Schedule:
    """Each step multiplies by the same factor: the usual schedule of a temperature.

    Parameters
    ----------
    start, end : float
        As for `linear`, but positive.
    steps : int
        As for `linear`.

    Returns
    -------
    Schedule
        A function of the step.

    Raises
    ------
    TypeError, ValueError
        As `linear`; also if `start` or `end` is not positive.

    References
    ----------
    Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017, section 4, anneals its temperature
    so.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> epsilon = softk.schedules.exponential(1.0, 0.01, steps=100)
    >>> round(epsilon(50), 6)
    0.1
    >>> epsilon(np.asarray([0, 50, 100])).round(6).tolist()
    [1.0, 0.1, 0.01]
    """
    return _schedule("exponential", start, end, steps)

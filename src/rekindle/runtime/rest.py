"""Steps that nobody has to look at: their plan keeps everything, and steps like them went as planned.

Problem: following a plan costs some microseconds an op, and one that keeps everything asks for nothing.
Source: what can be told of a step without looking at its ops is its course: which modules are called, in which order,
with what. A step whose course begins as that of a restful one is left alone, and looked at again from the first call on
that is another.
Known gaps: what runs outside of all modules, and what modules do with sizes that they are not called with, shows in
none of this; one step in some is looked at all the same.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from rekindle.runtime.arrival import Arrival
from rekindle.runtime.follow import Follower, PlannedStep

_EVERY = 61  # steps of a course, of which one is looked at; prime, to meet whatever is done every so many steps
_MOST_WOKEN = 3  # times that steps of a signature were to rest and went otherwise; then they never rest again
_MOST_KNOWN = 64
_OFF = 0.02  # of the predicted peak; a step that needs more did not go as planned


@dataclass(slots=True)
class Course:
    """What of a step can be told without looking at its ops.

    Attributes:
        calls: the modules that are called, in this order, and the shape of what each is called with.
        live: bytes that the ops had allocated before each call.
        roots: for the positions of outermost modules among these, the signature and the bytes that were there.
        made: how many activations of the stream were made before the first call.
        sure: whether all signatures tell the sizes.
        step: what was planned.
        highest: the most bytes that were live, measured or predicted.
        rested: how many such steps rested.
    """

    calls: list[tuple[weakref.ref[torch.nn.Module], object]] = field(default_factory=list)
    live: list[int] = field(default_factory=list)
    roots: dict[int, tuple[Hashable, int]] = field(default_factory=dict)
    made: int = 0
    sure: bool = True
    step: PlannedStep | None = None
    highest: int = 0
    rested: int = 0

    @property
    def signature(self) -> Hashable:
        """That of the first outermost module; None if there is none."""
        return self.roots[0][0] if 0 in self.roots else None


class Rest:
    """The courses of the steps that may rest, and whether the running step is one of them."""

    def __init__(self, meet: Callable[[torch.nn.Module], int]) -> None:
        """`meet(module)` counts the parameters, gradients and buffers of a module, and returns the bytes that are
        new."""
        self._meet = meet
        self._known: dict[Hashable, Course] = {}
        self._woken: Counter[Hashable] = Counter()
        self._course = Course()
        self._expected: Course | None = None
        self._position = 0
        self._there = 0

    def begin(self) -> None:
        """A step begins."""
        self._course, self._expected = Course(), None

    # -- a step that is looked at ------------------------------------------------------------------------------------

    def called(self, module: torch.nn.Module, args: Any, live: int) -> None:
        """Note that a module is about to be called, with `live` bytes of what the ops made."""
        self._course.calls.append((weakref.ref(module), _shape_of(args)))
        self._course.live.append(live)

    def arrived(self, arrival: Arrival | None, there: int, made: int) -> None:
        """Note that this module is an outermost one. `there` are all bytes that are there if it is the first one of the
        step, those that are new else; `made` activations of the stream were made."""
        course = self._course
        self._there = there if not course.roots else self._there + there
        course.made = course.made if course.roots else made
        course.sure = course.sure and arrival is not None and arrival.sure
        course.roots[len(course.calls) - 1] = (None if arrival is None else arrival.signature, self._there)

    def is_first(self) -> bool:
        """Whether no outermost module was called in the step yet."""
        return not self._course.roots

    def knows(self, follower: Follower | None) -> bool:
        """Whether the step, at its first call, begins as one that may rest; from then on it is expected to go on so."""
        expected = self._known.get(self._course.signature)
        if expected is None or expected.step is None or follower is None or len(self._course.calls) != 1:
            return False
        if not self._course.sure or self._course.made != expected.made or not follower.may_become(expected.step):
            return False
        if not _has_room(expected, 0, self._there) or not self._begins(expected):
            return False
        expected.rested += 1
        if expected.rested % _EVERY == 0:
            return False
        self._expected, self._position = expected, 1
        return True

    def ended(self, follower: Follower | None, peak: int, calm: bool) -> None:
        """Note how a step went that was looked at: the most bytes that were live, and `calm` if nothing was evicted or
        recorded and nothing failed."""
        course = self._course
        signature = course.signature
        step = follower.completed() if follower is not None else None
        known = self._known.pop(signature, None)
        if known is not None and follower is not None and follower.departed:
            self._doubt(signature)
        forecast = step.plan.forecast if step is not None else None
        if step is None or forecast is None or not step.restful:
            return
        right = calm and course.sure and peak <= min((1 + _OFF) * forecast.peak, forecast.budget)
        if signature is None or not right or self._woken[signature] >= _MOST_WOKEN:
            return
        course.step, course.highest = step, max(peak, forecast.peak)
        if len(self._known) >= _MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[signature] = course

    # -- a step that rests -------------------------------------------------------------------------------------------

    def expects(self, module: torch.nn.Module, args: Any) -> bool:
        """Whether the call of a module that is about to run is the one that was expected."""
        expected, position = self._expected, self._position
        if expected is None or position >= len(expected.calls):
            return False
        known, shape = expected.calls[position]
        if known() is not module or shape != _shape_of(args):
            return False
        self._position = position + 1
        return position not in expected.roots or self._is_root(expected, position, module)

    def finished(self) -> bool:
        """Whether all calls came that were expected."""
        return self._expected is not None and self._position == len(self._expected.calls)

    def woken(self) -> int:
        """Note that the step went otherwise. Returns the bytes that its ops have allocated unseen."""
        expected, self._expected = self._expected, None
        if expected is None:
            return 0
        self._known.pop(expected.signature, None)
        self._doubt(expected.signature)
        return max(0, expected.live[min(self._position, len(expected.live) - 1)] - expected.live[0])

    def _doubt(self, signature: Hashable) -> None:
        self._woken[signature] += 1
        if len(self._woken) > _MOST_KNOWN:
            del self._woken[next(iter(self._woken))]

    def _begins(self, expected: Course) -> bool:
        (known, shape), (module, given) = expected.calls[0], self._course.calls[0]
        return known() is module() and shape == given

    def _is_root(self, expected: Course, position: int, module: torch.nn.Module) -> bool:
        self._there += self._meet(module)
        arrival = arrival_of(module)
        if arrival is None or not arrival.sure or arrival.signature != expected.roots[position][0]:
            return False
        return _has_room(expected, position, self._there)


def arrival_of(module: torch.nn.Module) -> Arrival | None:
    """The call of a module that is about to run; None if it was called in an unusual way, or with tensors that have no
    shape."""
    try:
        return Arrival.of(module)
    except (LookupError, RuntimeError):
        return None


def _has_room(course: Course, position: int, there: int) -> bool:
    """Whether what is there in excess of what was there, when the step was looked at, fits too."""
    more = there - course.roots[position][1]
    forecast = course.step.plan.forecast if course.step is not None else None
    return more <= 0 or (forecast is not None and course.highest + more <= forecast.budget)


def _shape_of(args: Any) -> object:
    first = args[0] if args else None
    if not isinstance(first, torch.Tensor):
        return None
    try:
        return first.shape
    except RuntimeError:  # nested tensors have none
        return object()

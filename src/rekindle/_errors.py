"""The whole exception tree.

RekindleError
|-- BytesError             an amount of memory that cannot be understood
|-- PolicyError            a policy that cannot be used as written
|-- GraphError             a graph or plan that breaks the rules, or a file that holds none
|-- SessionError           a session used out of turn: entered twice, applied twice
|-- PlanMismatch           a step that is not the one that its plan was made for
|-- UnsupportedContext     a place where sessions cannot work: torch.func transforms, CUDA graph capture
|-- UnknownTensor          a tensor the session never saw
|-- PressureError          thresholds of memory pressure that make no sense
|-- BudgetInfeasible       the step does not fit, whatever is evicted
|-- RehearsalError         a step that cannot be run without data
|-- RehearsalWarning       the same, where the session can go on: warned of, and raised only if you ask for that
`-- RecomputeError         what was evicted cannot be brought back
    |-- LeafModified       a parameter or input that it is recomputed from was changed since
    |-- RecomputeMismatch  the op gave something else when it was repeated
    `-- SavedTensorModified  an in-place operation changed a saved tensor, which plain autograd refuses too
"""

from __future__ import annotations


class RekindleError(Exception):
    """What every error of Rekindle is."""


class BytesError(RekindleError, ValueError):
    """An amount of memory that cannot be understood."""


class PolicyError(RekindleError, ValueError):
    """A policy that cannot be used as written."""


class GraphError(RekindleError, ValueError):
    """A graph or plan that breaks the rules, or a file that holds none."""


class SessionError(RekindleError, RuntimeError):
    """A session used out of turn."""


class PlanMismatch(RekindleError, RuntimeError):
    """A step that is not the one that its plan was made for."""


class UnsupportedContext(RekindleError, RuntimeError):
    """A place where sessions cannot work."""


class UnknownTensor(RekindleError, ValueError):
    """A tensor the session never saw."""


class PressureError(RekindleError, ValueError):
    """Thresholds of memory pressure that make no sense."""


class BudgetInfeasible(RekindleError, RuntimeError):
    """The step does not fit into the memory budget, whatever is evicted."""


class RehearsalError(RekindleError, RuntimeError):
    """A step that cannot be run on fake tensors, which have no data."""


class RehearsalWarning(RekindleError, UserWarning):
    """A step that was to be planned ahead cannot be rehearsed; it makes room op by op and is recorded instead."""


class RecomputeError(RekindleError, RuntimeError):
    """What was evicted cannot be brought back."""


class LeafModified(RecomputeError):
    """A parameter or input that an activation is recomputed from was changed since the forward pass."""


class RecomputeMismatch(RecomputeError):
    """An op gave something else when it was repeated."""


class SavedTensorModified(RecomputeError):
    """An in-place operation changed a saved tensor; plain autograd refuses that too."""

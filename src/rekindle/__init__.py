"""Train PyTorch models inside the memory you have.

    session = rekindle.Session(policy=rekindle.PerModule(Block))
    for batch in loader:
        with session:
            loss = model(batch)
            loss.backward()
        optimizer.step()

The house, in the order a step passes through it: `graph` (a step on paper), `policy` (what to keep), `report` (plans
for people), `record` (watch a step from below autograd), `runtime` (keep, evict, recompute), `_api` (the verbs). See
docs/layout.md.
"""

from rekindle._api import apply, max_batch, plan, remove, session_of
from rekindle._errors import (
    BudgetInfeasible,
    BytesError,
    GraphError,
    LeafModified,
    PlanMismatch,
    PolicyError,
    PressureError,
    RecomputeError,
    RecomputeMismatch,
    RehearsalError,
    RehearsalWarning,
    RekindleError,
    SavedTensorModified,
    SessionError,
    UnknownTensor,
    UnsupportedContext,
)
from rekindle.graph import Graph, Plan, load_graph, print_plans_with, save_graph
from rekindle.policy import Balanced, ByDepth, EveryN, KeepAll, KeepNone, MemoryOptimal, PerModule, SpeedOptimal
from rekindle.record.activation import Activation
from rekindle.report import describe_plan
from rekindle.runtime.eviction import Eviction, EvictionPolicy, Sweep
from rekindle.runtime.pressure import AcceleratorReader, FakeReader, Level, LiveReader, MemoryReader, Pressure
from rekindle.runtime.session import Session
from rekindle.runtime.stats import Stats

print_plans_with(describe_plan)
del describe_plan, print_plans_with  # print(plan) is how to ask for it

__all__ = [
    "AcceleratorReader",
    "Activation",
    "Balanced",
    "BudgetInfeasible",
    "ByDepth",
    "BytesError",
    "EveryN",
    "Eviction",
    "EvictionPolicy",
    "FakeReader",
    "Graph",
    "GraphError",
    "KeepAll",
    "KeepNone",
    "LeafModified",
    "Level",
    "LiveReader",
    "MemoryOptimal",
    "MemoryReader",
    "PerModule",
    "Plan",
    "PlanMismatch",
    "PolicyError",
    "Pressure",
    "PressureError",
    "RecomputeError",
    "RecomputeMismatch",
    "RehearsalError",
    "RehearsalWarning",
    "RekindleError",
    "SavedTensorModified",
    "Session",
    "SessionError",
    "SpeedOptimal",
    "Stats",
    "Sweep",
    "UnknownTensor",
    "UnsupportedContext",
    "apply",
    "load_graph",
    "max_batch",
    "plan",
    "remove",
    "save_graph",
    "session_of",
]

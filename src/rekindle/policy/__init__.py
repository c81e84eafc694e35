"""What to keep. Imports no torch."""

from rekindle.policy.base import CallLike, Decider, PolicyLike, check_policy, decider_of, make_plan
from rekindle.policy.budget import Constraints, Planner, least_recompute
from rekindle.policy.scores import Balanced, ByDepth, MemoryOptimal, SpeedOptimal
from rekindle.policy.simple import EveryN, KeepAll, KeepNone, PerModule

__all__ = [
    "Balanced",
    "ByDepth",
    "CallLike",
    "Constraints",
    "Decider",
    "EveryN",
    "KeepAll",
    "KeepNone",
    "MemoryOptimal",
    "PerModule",
    "Planner",
    "PolicyLike",
    "SpeedOptimal",
    "check_policy",
    "decider_of",
    "least_recompute",
    "make_plan",
]

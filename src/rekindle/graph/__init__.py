"""What a step computed, on paper. Imports no torch."""

from rekindle.graph.ir import Call, Demand, Graph, Op, Value
from rekindle.graph.plan import Plan
from rekindle.graph.serialize import graph_from_json, graph_to_json, load_graph, save_graph
from rekindle.graph.verify import verify_graph, verify_plan

__all__ = [
    "Call",
    "Demand",
    "Graph",
    "Op",
    "Plan",
    "Value",
    "graph_from_json",
    "graph_to_json",
    "load_graph",
    "save_graph",
    "verify_graph",
    "verify_plan",
]

"""What a step computed, on paper. Imports no torch."""

from rekindle.graph.ir import Call, Demand, Graph, Op, Value
from rekindle.graph.plan import Forecast, Plan, Turn
from rekindle.graph.serialize import graph_from_json, graph_to_json, load_graph, save_graph
from rekindle.graph.timeline import Simulator, Timeline, simulate
from rekindle.graph.verify import verify_graph, verify_plan

__all__ = [
    "Call",
    "Demand",
    "Forecast",
    "Graph",
    "Op",
    "Plan",
    "Simulator",
    "Timeline",
    "Turn",
    "Value",
    "graph_from_json",
    "graph_to_json",
    "load_graph",
    "save_graph",
    "simulate",
    "verify_graph",
    "verify_plan",
]

"""What a step computed, on paper. Imports no torch."""

from rekindle.graph.ir import Call, Demand, Graph, Op, Value
from rekindle.graph.moment import Moment, Share, fullest, module_at, module_of, op_name
from rekindle.graph.plan import Forecast, Plan, Turn, print_plans_with
from rekindle.graph.serialize import graph_from_json, graph_to_json, load_graph, save_graph
from rekindle.graph.timeline import Simulator, Timeline, simulate
from rekindle.graph.verify import verify_graph, verify_plan

__all__ = [
    "Call",
    "Demand",
    "Forecast",
    "Graph",
    "Moment",
    "Op",
    "Plan",
    "Share",
    "Simulator",
    "Timeline",
    "Turn",
    "Value",
    "fullest",
    "graph_from_json",
    "graph_to_json",
    "load_graph",
    "module_at",
    "module_of",
    "op_name",
    "print_plans_with",
    "save_graph",
    "simulate",
    "verify_graph",
    "verify_plan",
]

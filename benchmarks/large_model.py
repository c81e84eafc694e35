"""How long does it take to plan a step of a model with 8 billion parameters, and in how much memory?

    python benchmarks/large_model.py [--write]

The model is of the size of Llama 3 8B: 32 layers, bfloat16, one sequence of 4096 tokens, planned for an H100 by its
roofline. Weights and inputs are on the meta device. Each plan is made anew from the graph that the rehearsal wrote
down. Memory is all that the process ever had resident, PyTorch itself included.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch
import transformers

import report
from rekindle.policy import Planner, least_recompute
from rekindle.runtime.rehearse import rehearse

_PLACES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # of the way from the floor to all that the step needs


def llama3_8b() -> torch.nn.Module:
    """The model, without bytes."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def resident() -> float:
    """The most memory that the process had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def main() -> None:
    """Rehearse, plan, print, and write on demand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/large_model.md")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokens = torch.zeros(1, 4096, dtype=torch.long, device="meta")
    start = time.perf_counter()
    graph = rehearse(llama3_8b(), (), {"input_ids": tokens, "labels": tokens, "use_cache": False}, device="h100")
    rows = [["rehearsal", "", "", "", "", f"{time.perf_counter() - start:.1f}"]]
    start = time.perf_counter()
    planner = Planner(graph)
    low, high = planner.floor(), planner.full
    rows.append(["floor", f"{low / 2**30:.2f}", "", "", "", f"{time.perf_counter() - start:.1f}"])
    whole = sum(op.seconds for op in graph.ops)
    for place in _PLACES:
        budget = low + int(place * (high - low))
        start = time.perf_counter()
        forecast = least_recompute(graph, budget).forecast
        took = time.perf_counter() - start
        assert forecast is not None
        gap = "-" if forecast.gap == float("inf") else f"{forecast.gap:.0%}"
        recomputed = f"{forecast.seconds * 1e3:.1f}", f"{forecast.seconds / whole:.1%}"
        rows.append([f"plan at {place:.0%}", f"{budget / 2**30:.2f}", *recomputed, gap, f"{took:.1f}"])
    header = ("", "GiB", "ms repeated", "of the step", "at most above the best", "seconds")
    body = f"{report.table(header, rows)}\n\n{len(graph.ops)} ops. Resident at most: {resident():.2f} GiB."
    print(body)
    if arguments.write:
        page = report.page("A large model", report.question(__doc__), body, ["transformers", "scipy"])
        report.write("large_model", page)


if __name__ == "__main__":
    main()

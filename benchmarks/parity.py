"""How often parity is wrong: healthy recipes that fail, and errors planted on purpose that pass; prints two tables.

    python benchmarks/parity.py [--replicas NAME …] [--dtypes DTYPE …] [--backends NAME …] [--seeds N] [--only healthy|planted]

Exits with 1 where a healthy recipe fails, or an error of 1% in what a component returns passes. All replicas with Inductor
and 20 seeds take more than an hour on one core.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pytest_diffopt import Call, Compilation, Recipe
from pytest_diffopt.checks import parity
from pytest_diffopt.checks.session import Session
from pytest_diffopt.checks.verdict import Verdict
from pytest_diffopt.replicas import families

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("aot_eager", "inductor")
SIZES = (0.01, 0.001, 0.0001)
QUANTITIES = ("rms", "largest", "scale", "channel")


def scaled_output(share: float) -> Callable[..., Any]:
    """A backend whose graphs return everything too large by that share."""

    def compile_graph(graph: Any, _inputs: Any) -> Callable[..., Any]:
        return lambda *given: tuple(
            one * (1 + share) if one is not None and one.is_floating_point() else one for one in graph(*given)
        )

    return compile_graph


def scaled_layer(share: float, argument: int | None = None) -> Callable[..., Any]:
    """A backend that scales one linear layer amid the graph: what it returns, or an argument of it (2 is its bias)."""

    def compile_graph(graph: Any, _inputs: Any) -> Any:
        import torch

        layers = [
            node
            for node in graph.graph.nodes
            if node.op == "call_function" and node.target is torch._C._nn.linear and len(node.args) > 2 and node.args[2]
        ]
        if not layers:
            return graph
        layer = layers[len(layers) // 2]
        if argument is None:
            with graph.graph.inserting_after(layer):
                scaled = graph.graph.call_function(torch.mul, (layer, 1 + share))
            layer.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        else:
            with graph.graph.inserting_before(layer):
                scaled = graph.graph.call_function(torch.mul, (layer.args[argument], 1 + share))
            layer.update_arg(argument, scaled)
        graph.recompile()
        return graph

    return compile_graph


PLANTED: dict[str, Callable[[float], Callable[..., Any]]] = {
    "what the component returns": scaled_output,
    "what one layer of it returns": scaled_layer,
    "the bias of one layer": lambda share: scaled_layer(share, 2),
}


def recipe(name: str, dtype: str, seed: int, backend: str | Callable[..., Any]) -> Recipe:
    """The denoiser of a replica, compiled; two steps a call."""
    denoiser = "unet" if "unet" in families()[name].components else "transformer"
    return Recipe(
        name,
        name,
        dtype=dtype,
        compilation=Compilation(denoiser, backend=backend),
        call=Call(seed=seed, num_inference_steps=2),
    )


def shares_of_what_is_allowed(session: Session, judged: Recipe) -> tuple[float, ...]:
    """Of each of the quantities, in the order of ``QUANTITIES``: the largest share of its limit over all tensors."""
    given = session.evidence(judged)
    if given.reference is None:
        return (0.0,) * len(QUANTITIES)
    found = parity.compare(given.observation, given.reference, given.limits.parity_multiple)
    return tuple(max(shares) for shares in zip(*(one.shares.values() for one in found), strict=True))


def healthy(names: Sequence[str], dtypes: Sequence[str], backends: Sequence[str], seeds: int) -> tuple[Table, int]:
    """A row a dtype and backend: how many verdicts there are of healthy recipes, how many failed, how near they came."""
    table = Table(title="healthy recipes: the largest share of its limit that a quantity took")
    for column in ("dtype", "backend", "recipes", "failed", "not run", *QUANTITIES):
        table.add_column(column)
    wrong = 0
    for dtype in dtypes:
        for backend in backends:
            statuses: Counter[str] = Counter()
            most = [0.0] * len(QUANTITIES)
            for name in names:
                for seed in range(seeds):
                    session, judged = Session(), recipe(name, dtype, seed, backend)
                    verdict: Verdict = session.judge(judged, "parity")
                    ran = session.evidence(judged).reference is not None
                    statuses[verdict.status if ran else "not run"] += 1
                    most = [max(pair) for pair in zip(most, shares_of_what_is_allowed(session, judged), strict=True)]
                    if verdict.status == "failed" and ran:
                        print(f"{dtype}, {backend}, seed {seed}: {verdict.text}", flush=True)
                    session.release()
            wrong += statuses["failed"]
            table.add_row(
                dtype,
                backend,
                str(statuses.total()),
                str(statuses["failed"]),
                str(statuses["not run"]),
                *(f"{one:.2f}" for one in most),
            )
    return table, wrong


def planted(names: Sequence[str], dtypes: Sequence[str]) -> tuple[Table, int]:
    """A row an error and dtype: in how many of the replicas each size of it is caught."""
    table = Table(title=f"errors that are caught, of {len(names)} replicas")
    for column in ("a scale error in", "dtype", *(f"{size:.2%}" for size in SIZES)):
        table.add_column(column)
    caught: Counter[tuple[str, str, float]] = Counter()
    for dtype in dtypes:
        for name in names:
            session = Session()
            for where, backend in PLANTED.items():
                for size in SIZES:
                    found = session.judge(recipe(name, dtype, 0, backend(size)), "parity")
                    caught[where, dtype, size] += found.status == "failed"
            session.release()
    missed = 0
    for where in PLANTED:
        for dtype in dtypes:
            table.add_row(where, dtype, *(str(caught[where, dtype, size]) for size in SIZES))
            missed += len(names) - caught[where, dtype, SIZES[0]] if where == next(iter(PLANTED)) else 0
    return table, missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", nargs="+", default=sorted(families()), choices=sorted(families()), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="healthy recipes of each combination")
    parser.add_argument("--only", choices=("healthy", "planted"), help="one of the two tables")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    wrong = 0
    if options.only != "planted":
        table, wrong = healthy(options.replicas, options.dtypes, options.backends, options.seeds)
        Console(width=120).print(table)
    if options.only != "healthy":
        table, missed = planted(options.replicas, options.dtypes)
        Console(width=120).print(table)
        wrong += missed
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())

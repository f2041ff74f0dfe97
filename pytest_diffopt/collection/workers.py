"""What each worker of pytest-xdist is given: its place among the workers of its host, and with it its share of the threads.

The controller writes the place into the worker's environment. The worker takes it out again: what it starts itself is no
worker.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from pytest_diffopt.report.lost_workers import LostWorkers
from pytest_diffopt.report.rows import KnownRecipes, about_of, recipe_of

PLACE_VARIABLE = "DIFFOPT_WORKER_PLACE"
THREADS = "OMP_NUM_THREADS"
COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
_MOST_COMPILERS = 32
"""Inductor's own limit of the processes that compile."""
_HOST_SECONDS = 5.0
"""How long a host is tried for that should start a worker again."""
_RESTARTS = 4
"""How many workers may be replaced for each, as xdist has it with ``-n``."""


@dataclass(frozen=True)
class Place:
    """Which of the workers of a host a process is.

    Attributes:
        index: from 0; a worker that replaces another one has its index.
        workers: how many the host has.
    """

    index: int
    workers: int

    def __str__(self) -> str:
        return f"{self.index}/{self.workers}"

    @classmethod
    def parse(cls, text: str) -> Place:
        """The inverse of ``str()``. Raises ValueError for anything else."""
        index, workers = map(int, text.split("/"))
        if not 0 <= index < workers:
            raise ValueError(text)
        return cls(index, workers)


PLACE = pytest.StashKey[Place]()
SHARED = pytest.StashKey[bool]()
"""Whether this worker has its share of the host."""
RECIPES = pytest.StashKey[KnownRecipes]()
"""In the controller: the recipes of items, as far as workers have told of them."""
_WORKER_INPUT = "diffopt_recipes"


def configure(config: pytest.Config) -> None:
    """Before xdist is configured: limits and listeners in the controller; in a worker, its place."""
    take_place(config)
    if config.pluginmanager.has_plugin("xdist"):
        permit_rsync(config)
        if config.getoption("dist") != "no" and not hasattr(config, "workerinput"):
            limit_restarts(config)
            config.stash[RECIPES] = KnownRecipes()
            config.pluginmanager.register(LostWorkers(config, config.stash[RECIPES]), "diffopt-lost-workers")


def permit_rsync(config: pytest.Config) -> None:
    """Let ``--rsyncdir`` be used where warnings are errors: xdist 3 deprecates it, and has nothing in its place."""
    if config.getoption("rsyncdir", None) or config.getini("rsyncdirs"):
        config.addinivalue_line("filterwarnings", "ignore:The --rsyncdir command line argument:DeprecationWarning")


# in the controller


def limit_restarts(config: pytest.Config) -> None:
    """Let workers named by ``--tx`` be replaced as often as those of ``-n``: xdist would go on for ever."""
    tx = config.getoption("tx", None)
    if tx and config.getoption("maxworkerrestart", None) is None and not config.getoption("numprocesses", None):
        from xdist.workermanage import parse_tx_spec_config

        config.option.maxworkerrestart = str(_RESTARTS * len(parse_tx_spec_config(config)))


def listen_to_worker(config: pytest.Config, node: Any) -> None:
    """Give a worker a channel on which it says which recipes its tests are over: xdist sends node ids alone."""
    if (recipes := config.stash.get(RECIPES, None)) is not None:
        channel = node.gateway.newchannel()
        channel.setcallback(recipes.update)
        node.workerinput[_WORKER_INPUT] = channel


def give_places(config: pytest.Config, specs: Sequence[Any]) -> None:
    """Write into each worker's environment which one of its host it is.

    Args:
        specs: execnet's, one a worker, in the order of their numbers.
    """
    import execnet

    outlive_hosts(config.pluginmanager.get_plugin("dsession"))
    proxies: dict[Any, Any] = {spec.id: spec for spec in map(execnet.XSpec, config.getoption("px", None) or ())}
    for spec, place in zip(specs, places([host_of(spec, proxies) for spec in specs]), strict=True):
        spec.env[PLACE_VARIABLE] = str(place)


def places(hosts: Iterable[str]) -> list[Place]:
    """The place of each worker; ``hosts`` has the host of each."""
    named = list(hosts)
    totals, seen = Counter(named), Counter[str]()
    found = []
    for host in named:
        found.append(Place(seen[host], totals[host]))
        seen[host] += 1
    return found


def host_of(spec: Any, proxies: dict[str, Any]) -> str:
    """The host that an execnet spec names: ``""`` for this one, else what stands in ``ssh=`` or before ``socket=``'s port.

    Args:
        proxies: specs of ``--px`` by their ids, for workers that are started ``via`` one of them.
    """
    if spec.via is not None and spec.via in proxies:
        return host_of(proxies[spec.via], proxies)
    if spec.ssh is not None:
        return str(spec.ssh).split()[-1].rpartition("@")[2]
    if spec.socket is not None:
        return str(spec.socket).rpartition(":")[0]
    return str(spec.vagrant_ssh or "")


def outlive_hosts(distribution: Any) -> None:
    """Let a run go on without a host that is gone: xdist stops where a worker cannot be started again.

    Args:
        distribution: xdist's session in the controller. Its private method that starts a worker in another's place is
            wrapped (seen in xdist 3.6 to 3.8); where it has another name, xdist does as it does.
    """
    start_again = getattr(distribution, "_clone_node", None)
    if start_again is not None:
        distribution._clone_node = functools.partial(_start_again, distribution, start_again)


def _start_again(distribution: Any, start_again: Callable[[Any], Any], node: Any) -> Any:
    import execnet

    until = time.monotonic() + _HOST_SECONDS
    while time.monotonic() < until:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # execnet does not close a socket that was refused
            try:
                return start_again(node)
            except (execnet.HostNotFound, OSError, EOFError):
                gc.collect()
        time.sleep(_HOST_SECONDS / 20)
    distribution.report_line(f"{node.gateway.spec} cannot be reached again: the run goes on without it")
    scheduling = distribution.sched
    collected = getattr(scheduling, "node2collection", getattr(scheduling, "registered_collections", {}))
    if node not in collected:
        scheduling.numnodes -= 1
        if scheduling.numnodes and scheduling.collection_is_completed:
            scheduling.schedule()
    if distribution._active_nodes <= {node}:
        distribution.triggershutdown()
    return None


# in a worker


def tell_of_recipes(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Say which recipes items are of, where some are tests over a recipe: of the others the node id says it."""
    channel: Any = getattr(config, "workerinput", {}).get(_WORKER_INPUT)
    found = (
        {item.nodeid: about for item in items if (about := about_of(item)) is not None} if channel is not None else {}
    )
    if not all(map(recipe_of, found)):
        channel.send(found)


def take_place(config: pytest.Config) -> None:
    """Keep which worker of its host this process is; nothing where it is none."""
    text = os.environ.pop(PLACE_VARIABLE, None)
    if text is not None:
        config.stash[PLACE] = Place.parse(text)


def take_share(config: pytest.Config, device: str) -> None:
    """Leave this worker its share of the host: threads, processes that compile, and an accelerator of those visible.

    Called when the first recipe is read: a run without recipes is left as it is. Mostly torch is not imported by then,
    and reads all this when it is. What the user's environment says stays.

    Args:
        device: the kind that is asked for, ``"auto"`` for any.
    """
    place = config.stash.get(PLACE, None)
    if place is None or SHARED in config.stash:
        return
    config.stash[SHARED] = True
    if device in ("auto", "cuda"):
        from pytest_diffopt.accelerators.sharing import show_own_device

        show_own_device(place.index)
    share = threads_of(place, _cores())
    if THREADS not in os.environ:
        os.environ[THREADS] = str(share)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(share)
    if COMPILE_THREADS not in os.environ:
        compilers = min(share, _MOST_COMPILERS)
        os.environ[COMPILE_THREADS] = str(compilers)
        inductor: Any = sys.modules.get("torch._inductor.config")
        if inductor is not None:
            inductor.compile_threads = compilers


def threads_of(place: Place, cores: int) -> int:
    """How many of a host's cores a worker has for itself: at least one."""
    return max(1, cores // place.workers)


def _cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_index(config: pytest.Config) -> int | None:
    """Which worker of its host this process is, from 0; None outside of xdist's workers."""
    return config.stash[PLACE].index if PLACE in config.stash else None

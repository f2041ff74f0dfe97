"""Which worker gets what: places on hosts, devices, threads, units of the scheduler, and words for how a worker ended."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_diffopt.accelerators import Accelerator, sharing
from pytest_diffopt.collection.workers import Place, host_of, places, tell_of_recipes, threads_of
from pytest_diffopt.errors import UnverifiableError
from pytest_diffopt.report.lost_workers import LostWorkers, how_ended, write_failure
from pytest_diffopt.report.rows import RECIPE_PROPERTY, VERDICT_PROPERTY, KnownRecipes, recipe_of

# Places


def test_places_count_the_workers_of_each_host() -> None:
    assert [str(place) for place in places(["", "b", "", "b", "b"])] == ["0/2", "0/3", "1/2", "1/3", "2/3"]
    assert Place.parse("1/3") == Place(1, 3)


@pytest.mark.parametrize("text", ["", "1", "3/3", "-1/2", "a/b"])
def test_a_place_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Place.parse(text)


@pytest.mark.parametrize(
    ("spec", "host"),
    [
        ("popen", ""),
        ("popen//python=python3.12", ""),
        ("socket=10.0.0.7:8888", "10.0.0.7"),
        ("ssh=me@gpu-7//chdir=run", "gpu-7"),
        ("ssh=-p 5000 me@gpu-7", "gpu-7"),
        ("popen//via=far", "10.0.0.9"),
    ],
)
def test_a_host_is_what_the_spec_names(spec: str, host: str) -> None:
    execnet = pytest.importorskip("execnet")
    proxies = {"far": execnet.XSpec("id=far//socket=10.0.0.9:1")}
    assert host_of(execnet.XSpec(spec), proxies) == host


def test_threads_are_divided_and_each_worker_has_one() -> None:
    assert [threads_of(Place(0, workers), 8) for workers in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]


# Devices


class Devices:
    """torch.cuda, as far as it is asked."""

    def __init__(self, count: int) -> None:
        self.count, self.current = count, 0

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        self.current = index


def test_devices_are_taken_in_turn() -> None:
    taken = []
    for worker in range(5):
        devices = Devices(3)
        sharing.take_device("xpu", worker, devices)
        taken.append(devices.current)
    assert taken == [0, 1, 2, 0, 1]
    sharing.take_device("cpu", 1, None)  # the host is one


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.mark.usefixtures("no_torch")
def test_a_worker_sees_one_of_the_devices_that_the_user_made_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for worker in range(3):
        monkeypatch.setenv(sharing.VISIBLE, "4, 6")
        sharing.show_own_device(worker)
        seen.append(os.environ[sharing.VISIBLE])
    assert seen == ["4", "6", "4"]


@pytest.mark.usefixtures("no_torch")
def test_devices_that_nobody_named_are_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho GPU-aaa\necho GPU-bbb\n", encoding="utf-8")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(sharing.VISIBLE, "")
    monkeypatch.delenv(sharing.VISIBLE)
    sharing.show_own_device(1)
    assert os.environ[sharing.VISIBLE] == "GPU-bbb"
    monkeypatch.delenv(sharing.VISIBLE)
    driver.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    sharing.show_own_device(1)
    assert sharing.VISIBLE not in os.environ


def test_devices_stay_visible_where_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setenv(sharing.VISIBLE, "0,1")
    sharing.show_own_device(1)
    assert os.environ[sharing.VISIBLE] == "0,1"


HOST = Accelerator("cpu", "cpu")

HOLDER = """
import sys, time
from pytest_diffopt.accelerators import Accelerator
from pytest_diffopt.accelerators.sharing import held
with held(Accelerator("cpu", "cpu"), alone=sys.argv[1] == "alone"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("other", "own", "waits"),
    [("alone", False, True), ("shared", True, True), ("alone", True, True), ("shared", False, False)],
)
def test_who_is_alone_waits_for_others_and_others_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: str, own: bool, waits: bool
) -> None:
    monkeypatch.setenv("DIFFOPT_CACHE_DIR", str(tmp_path))
    said: list[str] = []
    with subprocess.Popen([sys.executable, "-c", HOLDER, other, "60"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"

        def told(text: str) -> None:
            said.append(text)
            holder.kill()  # a lock does not outlive who held it

        with sharing.held(HOST, alone=own, waiting=told):
            pass
        holder.kill()
    expected = f"waiting for cpu, which {'others use' if own else 'a recipe uses alone'}"
    assert said == ([expected] if waits else [])


def test_a_lock_that_cannot_be_made_hinders_only_who_needs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFOPT_CACHE_DIR", str(tmp_path / "file" / "below"))
    with sharing.held(HOST, alone=False):
        pass
    expected = r"asks for cpu alone, .* DIFFOPT_CACHE_DIR names a directory"
    with pytest.raises(UnverifiableError, match=expected), sharing.held(HOST, alone=True):
        pass


# The scheduler


class Node:
    """A worker of xdist that writes down what it is sent."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.sent: list[int] = []
        self.shutting_down = False

    def send_runtest_some(self, indices: list[int]) -> None:
        self.sent += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def configuration(dist: str) -> Any:
    options = {"dist": dist, "maxschedchunk": None, "tx": ["popen", "popen"], "loadscopereorder": True}
    return SimpleNamespace(
        getoption=lambda name, default=None: options.get(name, default),
        getvalue=options.__getitem__,
        option=SimpleNamespace(**options),
    )


def started(made: Any, collection: list[str]) -> list[Node]:
    nodes = [Node("gw0"), Node("gw1")]
    for node in nodes:
        made.add_node(node)
    for node in nodes:
        made.add_node_collection(node, collection)
    made.schedule()
    return nodes


def run_to_the_end(made: Any, nodes: list[Node], rng: random.Random, duration: float = 0.0) -> dict[str, list[int]]:
    """Workers run what they were sent, each when it knows the next item or was shut down, in any order."""
    done: dict[str, list[int]] = {node.gateway.id: [] for node in nodes}
    while True:
        able = [
            node
            for node in nodes
            if (left := len(node.sent) - len(done[node.gateway.id])) > 1 or (left == 1 and node.shutting_down)
        ]
        if not able:
            if not made.tests_finished or all(node.shutting_down for node in nodes):
                return done
            for node in nodes:
                node.shutdown()
            continue
        node = rng.choice(able)
        index = node.sent[len(done[node.gateway.id])]
        done[node.gateway.id].append(index)
        made.mark_test_complete(node, index, duration)


def checks(recipes: int, each: int = 4) -> list[str]:
    return [f"a.recipes.toml::r{recipe}::check{check}" for recipe in range(recipes) for check in range(each)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 3, 5, 40, 333])
def test_tests_without_recipes_are_sent_as_xdist_sends_them(count: int, seed: int) -> None:
    scheduler = pytest.importorskip("xdist.scheduler")
    from pytest_diffopt.collection.scheduling import RecipeScheduling

    collection = [f"test_a.py::test_{k}" for k in range(count)]
    ran = []
    for kind in (scheduler.LoadScheduling, RecipeScheduling):
        made = kind(configuration("load"), None)
        nodes = started(made, collection)
        ran.append((run_to_the_end(made, nodes, random.Random(seed)), [node.sent for node in nodes]))
    assert ran[0] == ran[1]


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("each", [1, 2, 4])
def test_recipes_stay_whole_and_everything_is_run_once(each: int, seed: int, groups: bool) -> None:
    pytest.importorskip("xdist")
    from pytest_diffopt.collection.scheduling import RecipeScheduling

    rng = random.Random(seed)
    plain = [f"test_a.py::test_{k}" for k in range(rng.choice([0, 1, 30]))]
    grouped = [f"test_b.py::test_{k}@together" for k in range(3)]
    collection = [*plain[:7], *checks(9, each), *plain[7:], *grouped]
    if seed % 2:
        rng.shuffle(collection)
    made = RecipeScheduling(configuration("loadgroup" if groups else "load"), None, groups=groups)
    nodes = started(made, collection)
    done = run_to_the_end(made, nodes, rng)
    assert sorted(sum(done.values(), [])) == list(range(len(collection)))  # noqa: RUF017
    ran_by: dict[str, set[str]] = {}
    for worker, indices in done.items():
        for index in indices:
            if (recipe := recipe_of(collection[index])) is not None:
                ran_by.setdefault(recipe["source"], set()).add(worker)
            if groups and collection[index].endswith("@together"):
                ran_by.setdefault("together", set()).add(worker)
    assert {unit: len(workers) for unit, workers in ran_by.items()} == dict.fromkeys(ran_by, 1)
    assert len(ran_by) == 9 + groups


OVER_RECIPES = KnownRecipes(
    {
        f"{source}{rest}": {"source": source, "recipe": recipe, "check": "any", "content": recipe}
        for recipe in ("r0", "r1")
        for source, rest in (
            [(f"tests/test_a.py::test_{k}[{recipe}]", "") for k in range(3)]
            + [(f"a.recipes.toml::{recipe}", f"::check{k}") for k in range(4)]
        )
    }
)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_test_over_a_recipe_runs_on_the_worker_of_its_checks(seed: int, groups: bool) -> None:
    pytest.importorskip("xdist")
    from pytest_diffopt.collection.scheduling import RecipeScheduling

    rng = random.Random(seed)
    tests = [nodeid for nodeid in OVER_RECIPES if nodeid.startswith("tests/")]
    plain = [f"tests/test_a.py::test_plain[{k}]" for k in range(9)]
    collection = [*checks(4), *tests, *plain]
    rng.shuffle(collection)
    suffix = "@mine" if groups else ""  # a group that the user wants goes before
    collection += [f"tests/test_a.py::test_own[r0]{suffix}"]
    known = KnownRecipes(OVER_RECIPES)
    known[collection[-1]] = {
        "source": "tests/test_a.py::test_own[r0]",
        "recipe": "r0",
        "check": "test_own",
        "content": "r0",
    }
    made = RecipeScheduling(configuration("load"), None, groups=groups, recipes=known)
    nodes = started(made, collection)
    done = run_to_the_end(made, nodes, rng)
    assert sorted(sum(done.values(), [])) == list(range(len(collection)))  # noqa: RUF017
    for recipe in ("r0", "r1"):
        items = [at for at, nodeid in enumerate(collection[:-1]) if (known.of(nodeid) or {}).get("content") == recipe]
        assert len(items) == 7
        workers = [worker for worker, indices in done.items() if set(items) & set(indices)]
        assert len(workers) == 1
    assert made._unit_of(collection[-1]) == ("mine" if groups else "r0")


def test_a_test_over_a_recipe_that_a_worker_takes_with_it_is_a_failed_verdict_of_that_recipe() -> None:
    told: list[pytest.TestReport] = []
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_runtest_logreport=lambda report: told.append(report)))
    lost = LostWorkers(config, OVER_RECIPES)
    node = SimpleNamespace(gateway=SimpleNamespace(id="gw0"))
    lost.pytest_xdist_node_collection_finished(node, ["tests/test_a.py::test_0[r0]", "tests/test_a.py::test_plain"])
    lost.ends.append("worker gw0 was killed (signal 9)")
    lost.pytest_sessionfinish(SimpleNamespace(exitstatus=pytest.ExitCode.TESTS_FAILED))  # type: ignore[arg-type]
    (report,) = told
    carried: dict[str, Any] = dict(report.user_properties)
    assert carried[RECIPE_PROPERTY]["source"] == "tests/test_a.py::test_0[r0]"
    assert carried[VERDICT_PROPERTY]["status"] == "failed"
    assert lost.lines([])[1:] == ["diffopt: 1 other tests were not run: tests/test_a.py::test_plain"]


def test_a_worker_tells_of_the_recipes_of_its_tests_and_of_nothing_else() -> None:
    sent: list[dict[str, Any]] = []
    config: Any = SimpleNamespace(workerinput={"diffopt_recipes": SimpleNamespace(send=sent.append)})

    def item(nodeid: str, about: dict[str, str] | None) -> Any:
        return SimpleNamespace(nodeid=nodeid, user_properties=[(RECIPE_PROPERTY, about)] if about else [])

    check = item("a.recipes.toml::r0::parity", {"source": "a.recipes.toml::r0"})
    tell_of_recipes(config, [check, item("test_a.py::test_b", None)])
    assert sent == []
    tell_of_recipes(config, [check, item("test_a.py::test_it[r0]", {"source": "test_a.py::test_it[r0]"})])
    assert [list(one) for one in sent] == [["a.recipes.toml::r0::parity", "test_a.py::test_it[r0]"]]
    tell_of_recipes(SimpleNamespace(), [check])  # type: ignore[arg-type]
    assert len(sent) == 1


def test_a_worker_holds_no_second_recipe_while_it_has_two_checks_left() -> None:
    pytest.importorskip("xdist")
    from pytest_diffopt.collection.scheduling import RecipeScheduling

    made = RecipeScheduling(configuration("load"), None)
    first, second = started(made, checks(10, 3))
    assert (first.sent, second.sent) == ([0, 1, 2], [15, 16, 17])
    made.mark_test_complete(first, 0, 10.0)
    assert first.sent == [0, 1, 2]
    made.mark_test_complete(first, 1, 0.0)  # it has to know what comes after the last
    assert first.sent == [0, 1, 2, 3, 4, 5]


def test_neighbours_go_to_one_worker_and_an_idle_one_takes_half_of_what_is_left() -> None:
    pytest.importorskip("xdist")
    from pytest_diffopt.collection.scheduling import RecipeScheduling

    made = RecipeScheduling(configuration("load"), None)
    first, second = started(made, checks(12, 2))

    def recipes_of(node: Node) -> list[int]:
        return [index // 2 for index in node.sent[::2]]

    done = 0
    while len(recipes_of(first)) < 8:  # the first worker is quick, the second has not done anything
        made.mark_test_complete(first, first.sent[done], 0.0)
        done += 1
    assert recipes_of(second) == [6]
    assert recipes_of(first) == [0, 1, 2, 3, 4, 5, 9, 10]


def test_a_recipe_that_ended_two_workers_is_given_up() -> None:
    pytest.importorskip("xdist")
    from pytest_diffopt.collection.scheduling import RecipeScheduling

    collection = checks(1, 4)
    made = RecipeScheduling(configuration("load"), None)
    first, second = started(made, collection)
    assert first.sent == [0, 1, 2, 3]
    assert made.remove_node(first) is None  # it was never begun: another worker runs it
    third = Node("gw2")
    for node, check in ((third, 0), (Node("gw3"), 1)):
        made.add_node(node)
        made.add_node_collection(node, collection)
        made.schedule()
        made.pytest_runtest_logstart(collection[check])
        assert made.remove_node(node) == collection[check]
    assert made.given_up == collection[2:]
    assert made.pending == []
    assert second.sent == []


# Words


@pytest.mark.parametrize(
    ("nodeid", "found"),
    [
        ("a.recipes.toml::flux::parity", ("a.recipes.toml::flux", "flux", "parity")),
        ("d/a.recipes.toml::f@2::parity@d/a.recipes.toml::f@2", ("d/a.recipes.toml::f@2", "f@2", "parity")),
        ("tests/test_a.py::test_b[a.recipes.toml]", None),
        ("tests/test_a.py::Class::test_b", None),
    ],
)
def test_a_checks_node_id_says_its_recipe(nodeid: str, found: tuple[str, str, str] | None) -> None:
    told = recipe_of(nodeid)
    assert (tuple(told.values()) if told else None) == found


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-9, "was killed (signal 9)"),
        (-15, "was killed (signal 15)"),
        (-11, "crashed (signal 11)"),
        (3, "ended by itself (exit status 3)"),
        (None, "was lost (Not properly terminated)"),
    ],
)
def test_how_a_process_ended_in_words(status: int | None, words: str) -> None:
    assert how_ended(status, "Not properly terminated") == words


def test_a_lost_check_carries_a_failed_verdict() -> None:
    recipe = recipe_of("a.recipes.toml::flux::parity")
    assert recipe is not None
    report = pytest.TestReport("a.recipes.toml::flux::parity", ("", None, ""), {}, "failed", "", "call")
    write_failure(report, recipe, "worker gw0 was killed (signal 9) while it ran flux · parity")
    carried: dict[str, Any] = dict(report.user_properties)
    assert carried[RECIPE_PROPERTY] == {"source": "a.recipes.toml::flux", "recipe": "flux", "check": "parity"}
    assert carried[VERDICT_PROPERTY]["status"] == "failed"
    assert report.longrepr == (
        "flux · parity: worker gw0 was killed (signal 9) while it ran flux · parity\n"
        "  signal 9 is what a kernel sends a process when memory runs out: its log (dmesg) says whether it did\n"
        "  without other workers: python -m pytest -n 0 'a.recipes.toml::flux'"
    )


def test_a_run_without_recipes_is_told_nothing() -> None:
    lost = LostWorkers(SimpleNamespace())  # type: ignore[arg-type]
    node = SimpleNamespace(gateway=SimpleNamespace(id="gw0"))
    lost.pytest_xdist_node_collection_finished(node, ["test_a.py::test_b"])
    lost.ends.append("worker gw0 was killed (signal 9) while it ran test_a.py::test_b")
    assert lost.lines(["test_a.py"]) == []
    lost.pytest_xdist_node_collection_finished(node, ["a.recipes.toml::flux::parity"])
    assert lost.lines(["test_a.py"]) == ["diffopt: worker gw0 was killed (signal 9) while it ran test_a.py::test_b"]

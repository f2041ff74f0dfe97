"""Baselines: what is kept, what differs and in which direction, and files that are whole or refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_diffopt.baseline.comparison import differences
from pytest_diffopt.baseline.judging import Baselines
from pytest_diffopt.baseline.key import Key, key_of, nearest
from pytest_diffopt.baseline.latency import latency_of, steady_ratio
from pytest_diffopt.baseline.outputs import OutputDigest
from pytest_diffopt.baseline.record import (
    Break,
    Engaged,
    Latency,
    Peaks,
    QuantizedLayers,
    Ratio,
    Recompile,
    Record,
    Resident,
    record_of,
)
from pytest_diffopt.baseline.store import (
    Found,
    Store,
    _digest,
    made_entry,
    name_of,
    parsed,
    read_all,
    source_of,
    text_of,
)
from pytest_diffopt.errors import BaselineError
from pytest_diffopt.observation.observation import (
    CallMemory,
    CallRecord,
    CompileRecord,
    Failure,
    FrameAttempt,
    GraphBreak,
    Layer,
    MemoryRecord,
    Observation,
    Place,
    RegionRuns,
)

VERSIONS = {
    "python": "3.11",
    "torch": "2.13.0",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
}
KEY = Key("sim", "Simulated accelerator", None, "", VERSIONS)
MIB = 2**20
BREAK = Break("transformer", "models/flux.py", 412, "Block.forward", "Dynamic shape operator", False, 2)
RECOMPILE = Recompile("transformer", "models/flux.py", 412, "Block.forward", ("L['self'].step == 1",), 5)
RECORD = Record(
    recipe={"pipeline": "tiny-flux", "compilation": [{"component": "transformer"}]},
    graphs={"transformer": 2},
    breaks=(BREAK,),
    recompiles=(RECOMPILE,),
    engaged={"transformer": Engaged(9, 9)},
    quantized={"transformer": {"nf4": QuantizedLayers(("a", "b", "c"), 3000, 300)}},
    component_bytes={"transformer": 9000, "vae": 500},
    residency=Resident({"transformer": 9000, "vae": 500}, ({"transformer": 0, "vae": 0},) * 3),
    peaks=Peaks((10 * MIB, 12 * MIB), 20 * MIB, 0.0),
    required_tolerance=0.01,
    tolerance_floor=0.008,
)


def one_difference(now: Record, recorded: Record = RECORD, accelerator: str = "sim") -> tuple[str, str]:
    (found,) = differences(recorded, now, accelerator)
    return found.direction, found.line


def test_nothing_differs_from_itself() -> None:
    assert differences(RECORD, RECORD, "sim") == []


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"graphs": {"transformer": 3}}, "worse: graphs of transformer: 2 recorded, 3 now"),
        ({"graphs": {"transformer": 1}}, "better: graphs of transformer: 2 recorded, 1 now"),
        ({"graphs": {}}, "worse: graphs of transformer: 2 recorded, 0 now"),
        (
            {"breaks": ()},
            "better: graph breaks in transformer at Block.forward models/flux.py (Dynamic shape operator): 2 recorded, 0 now",
        ),
        (
            {"breaks": (BREAK, replace(BREAK, reason="Data-dependent branch", count=1))},
            "worse: graph breaks in transformer at Block.forward models/flux.py (Data-dependent branch): 0 recorded, 1 now",
        ),
        (
            {"breaks": (replace(BREAK, count=3),)},
            "worse: graph breaks in transformer at Block.forward models/flux.py (Dynamic shape operator): 2 recorded, 3 now",
        ),
        (
            {"recompiles": ()},
            "better: recompiles in transformer at Block.forward models/flux.py (guards: L['self'].step == 1): 5 recorded",
        ),
        ({"limits_exhausted": 1}, "worse: frames at an exhausted recompile limit: 0 recorded, 1 now"),
        (
            {"engaged": {"transformer": Engaged(9, 8)}},
            "worse: calls that ran compiled code in transformer: 9 of 9 recorded, 8 of 9 now",
        ),
        (
            {"quantized": {"transformer": {"nf4": QuantizedLayers(("a", "b"), 2000, 200)}}},
            "worse: format of a layer of transformer: c: nf4 recorded, plain now",
        ),
        (
            {"quantized": {"transformer": {"nf4": QuantizedLayers(("a", "b", "c", "d"), 4000, 400)}}},
            "better: format of a layer of transformer: d: plain recorded, nf4 now",
        ),
        (
            {"quantized": {"transformer": {"nf4": QuantizedLayers(("a", "b", "c"), 3000, 301)}}},
            "worse: bytes of the nf4 scales and other inner tensors of transformer: 300 B recorded, 301 B now",
        ),
        (
            {"component_bytes": {"transformer": 9001, "vae": 500}},
            "worse: bytes of transformer: 9000 recorded, 9001 B now",
        ),
        ({"component_bytes": {"transformer": 9000}}, "changed: bytes of vae: 500 B recorded, none now"),
        (
            {"residency": replace(RECORD.residency, calls=({"transformer": 512, "vae": 0},) * 3)},  # type: ignore[type-var]
            "worse: on the accelerator after call 0: transformer: 0 B recorded, 512 B now",
        ),
        ({"failure": "RuntimeError"}, "worse: the run ends with: no error recorded, RuntimeError now"),
        ({"required_tolerance": 0.02}, "worse: tolerance that parity requires: 0.01 recorded, 0.02 now"),
        ({"required_tolerance": None}, "worse: tolerance that parity requires: 0.01 recorded, none now"),
        (
            {"recipe": {"pipeline": "tiny-flux", "compilation": []}},
            "changed: the recipe's compilation: [{'component': 'transformer'}] recorded, [] now",
        ),
    ],
)
def test_a_difference_is_told_with_its_direction(changed: dict[str, Any], line: str) -> None:
    direction, told = one_difference(replace(RECORD, **changed))
    assert told.startswith(line)
    assert line.startswith(direction)


def test_a_difference_too_small_for_the_unit_is_told_in_bytes() -> None:
    big = replace(RECORD, component_bytes={"transformer": 9 * MIB})
    _, line = one_difference(replace(RECORD, component_bytes={"transformer": 9 * MIB + 1}), big)
    assert line == f"worse: bytes of transformer: {9 * MIB} recorded, {9 * MIB + 1} B now"


def test_lines_of_code_that_moved_are_no_difference() -> None:
    moved = replace(RECORD, breaks=(replace(BREAK, line=999),), recompiles=(replace(RECOMPILE, line=1),))
    assert differences(RECORD, moved, "sim") == []


def test_the_worse_stands_first() -> None:
    both = replace(RECORD, breaks=(), limits_exhausted=3)
    assert [one.direction for one in differences(RECORD, both, "sim")] == ["worse", "better"]


@pytest.mark.parametrize(
    ("call_bytes", "noise", "accelerator", "direction"),
    [
        (int(20.01 * MIB), 0.0, "sim", None),
        (int(20.1 * MIB), 0.0, "sim", "worse"),
        (int(19.9 * MIB), 0.0, "sim", "better"),
        (int(20.1 * MIB), 0.01, "sim", None),
        (int(20.1 * MIB), 0.0, "cuda", None),
        (int(20.3 * MIB), 0.0, "cuda", "worse"),
    ],
)
def test_peaks_are_compared_by_ratio_with_the_measured_noise(
    call_bytes: int, noise: float, accelerator: str, direction: str | None
) -> None:
    now = replace(RECORD, peaks=Peaks((10 * MIB, 12 * MIB), call_bytes, noise))
    assert [one.direction for one in differences(RECORD, now, accelerator)] == ([direction] if direction else [])


@pytest.mark.parametrize(
    ("loads", "direction"),
    [
        ((11 * MIB,), None),
        ((12 * MIB,), None),
        ((13 * MIB,), "worse"),
        ((13 * MIB, 12 * MIB), None),
        ((9 * MIB,), "better"),
    ],
)
def test_a_peak_of_loading_is_worse_where_every_load_is_above_every_recorded_one(
    loads: tuple[int, ...], direction: str | None
) -> None:
    now = replace(RECORD, peaks=Peaks(loads, 20 * MIB, 0.0))
    assert [one.direction for one in differences(RECORD, now, "sim")] == ([direction] if direction else [])


@pytest.mark.parametrize(
    ("recorded", "now", "floor", "worse"),
    [(0.01, 0.012, 0.0, False), (0.01, 0.02, 0.03, False), (0.0, 1e-7, 2e-7, False), (0.0, 1e-2, 2e-7, True)],
)
def test_a_tolerance_grows_beyond_the_recorded_one_and_the_measured_floor(
    recorded: float, now: float, floor: float, worse: bool
) -> None:
    before = replace(RECORD, required_tolerance=recorded)
    after = replace(RECORD, required_tolerance=now, tolerance_floor=floor)
    assert bool(differences(before, after, "sim")) is worse


def test_latency_is_worse_where_the_intervals_do_not_touch_and_is_told_apart_by_call() -> None:
    before = replace(RECORD, latency=Latency(Ratio(5, 4, 6), Ratio(0.8, 0.7, 0.9), Ratio(0.7, 0.6, 0.8)))
    touching = replace(RECORD, latency=Latency(Ratio(6, 5, 7), Ratio(0.9, 0.85, 1.0), Ratio(0.7, 0.6, 0.8)))
    slower = replace(RECORD, latency=Latency(Ratio(5, 4, 6), Ratio(0.8, 0.7, 0.9), Ratio(1.0, 0.9, 1.1)))
    assert differences(before, touching, "cuda") == []
    assert one_difference(slower, before)[1] == "worse: time against eager, steady call: 0.7× recorded, 1× now"


def test_what_was_measured_and_is_not_any_more_is_worse_and_told_once_where_the_run_ends() -> None:
    before = replace(RECORD, latency=Latency(steady=Ratio(0.7, 0.6, 0.8)))
    assert one_difference(RECORD, before)[1] == "worse: time against eager: measured recorded, not measured now"
    assert differences(RECORD, before, "cuda") == []  # a baseline of a release that did not measure it
    ended = replace(before, failure="RuntimeError", required_tolerance=None, latency=None)
    assert one_difference(ended, before)[1].startswith("worse: the run ends with")
    parity = one_difference(RECORD, replace(RECORD, required_tolerance=None))
    assert parity == ("better", "better: tolerance that parity requires: none recorded, 0.01 now")


# what is kept of an observation


def observation(**changed: Any) -> Observation:
    place = Place("hooks/group.py", 401, "torch_dynamo_resume_in_pre_forward_at_398")
    given: dict[str, Any] = {
        "recipe": {"name": "r", "pipeline": "/home/me/repo/pipe", "contract": {"max_memory": "1GiB"}},
        "content_hash": "0",
        "accelerator": "sim",
        "device": "Simulated accelerator",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "bitsandbytes": "0.50.2", "gguf": "0.19.0"},
        "calls": (CallRecord(0, "call", 1.0), CallRecord(1, "call", 1.0), CallRecord(2, "sensitivity", 1.0)),
        "compiles": CompileRecord(
            frames=(
                FrameAttempt(0, "unet", "", place, False, "compiled", graphs=2),
                FrameAttempt(1, "unet", "", place, False, "compiled", recompile=True, guards=("id 139872364876544",)),
                FrameAttempt(1, "unet", "", place, False, "limit"),
            ),
            graph_breaks=(
                GraphBreak(0, "unet", "", place, place, "calls <f at 0x7f1e77237740>"),
                GraphBreak(1, "unet", "", replace(place, line=400), place, "calls <f at 0x7f0000000000>"),
            ),
            regions=(RegionRuns(0, "unet", "", place, 3, 2, 2, 9), RegionRuns(2, "unet", "", place, 3, 0, 0, 0)),
        ),
        "layers": (
            Layer("unet", "b", "Linear4bit", "nf4", "uint8", "", 8, 8, 32, 4),
            Layer("unet", "a", "Linear4bit", "nf4", "uint8", "", 8, 8, 32, 4),
            Layer("unet", "c", "Linear", "", "float32", "", 8, 8, 256, 0),
        ),
        "memory": MemoryRecord(
            100,
            1100,
            600,
            (
                CallMemory(0, 5100, 100, {"unet": 7}, inputs="x"),
                CallMemory(1, 4100, 100, {"unet": 0}, inputs="x"),
                CallMemory(2, 4200, 100, {"unet": 9}, inputs="y"),
                CallMemory(3, 4120, 100, {"unet": 9}, inputs="x", repeated=True),
            ),
            {"unet": 500},
        ),
    }
    return Observation(**{**given, **changed})


def test_what_moves_by_itself_is_not_kept() -> None:
    record = record_of(observation(), folder="/home/me/repo")
    function = "torch_dynamo_resume_in_pre_forward"
    assert record.recipe == {"pipeline": "pipe"}
    assert record.breaks == (Break("unet", "hooks/group.py", 400, function, "calls <f at 0x…>", False, 2),)
    assert record.recompiles == (Recompile("unet", "hooks/group.py", 401, function, ("id …",), 1),)
    assert record == record_of(observation(recipe={"name": "other", "pipeline": "pipe"}), folder="/elsewhere")


def test_what_a_recipe_does_is_kept() -> None:
    record = record_of(observation())
    assert record.graphs == {"unet": 2}
    assert record.limits_exhausted == 1
    assert record.engaged == {"unet": Engaged(3, 2)}  # the sensitivity run is ours
    assert record.quantized == {"unet": {"nf4": QuantizedLayers(("a", "b"), 64, 8)}}
    assert record.residency == Resident({"unet": 500}, ({"unet": 7}, {"unet": 0}))
    assert record.peaks == Peaks((1000,), 5000, round(20 / 4020, 6))


def test_a_key_has_the_device_and_the_versions_of_the_libraries_in_use() -> None:
    from pytest_diffopt import Quantization, Recipe
    from pytest_diffopt.accelerators import Accelerator

    recipe = Recipe("r", "tiny-flux", quantization=Quantization("bitsandbytes_4bit", components="transformer"))
    key = key_of(recipe, observation(), Accelerator("cuda", "NVIDIA L4", 1, (8, 9)), "eager")
    assert key.versions == {"python": "3.11", "torch": "2.13.0", "bitsandbytes": "0.50.2"}
    assert key.place == "cuda (NVIDIA L4, capability 8.9, compile backend eager)"


def test_the_nearest_versions_on_the_same_device_are_taken_and_no_other_device() -> None:
    def at(torch: str, **changed: Any) -> Key:
        return replace(KEY, versions={**VERSIONS, "torch": torch}, **changed)

    near, far = at("2.12.0"), at("1.13.0")
    assert nearest(KEY, [far, near]) == near
    assert nearest(KEY, [far, near, KEY]) == KEY
    assert nearest(at("2.13.0+cpu"), [near, KEY]) == KEY
    for foreign in (
        {"device": "NVIDIA H100"},
        {"accelerator": "cuda"},
        {"capability": (8, 9)},
        {"compile_backend": "eager"},
    ):
        assert nearest(KEY, [replace(KEY, **foreign)]) is None  # type: ignore[arg-type]


# files


def stored(tmp_path: Path, *entries: tuple[Key, Record], source: str = "a/x.recipes.toml") -> Path:
    for key, record in entries:
        Store(tmp_path).record(source, "r", made_entry(key, record))
    return tmp_path / name_of(source, "r")


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    other = replace(KEY, accelerator="cuda", device="NVIDIA L4", capability=(8, 9))
    path = stored(tmp_path, (KEY, RECORD), (other, replace(RECORD, graphs={})))
    assert path == tmp_path / "a" / "x" / "r.json"
    file = parsed(Found(path.read_text(encoding="utf-8")))
    assert file.entry(KEY) == made_entry(KEY, RECORD)
    assert file.entry(other) == made_entry(other, replace(RECORD, graphs={}))
    assert text_of(file) == path.read_text(encoding="utf-8")


def test_recording_the_same_again_leaves_the_file_and_a_change_replaces_its_own_entry_alone(tmp_path: Path) -> None:
    other = replace(KEY, accelerator="cuda")
    path = stored(tmp_path, (KEY, RECORD), (other, RECORD))
    before = path.read_bytes()
    within_noise = replace(RECORD, peaks=Peaks((11 * MIB,), 20 * MIB + 1, 0.0))
    assert Store(tmp_path).record("a/x.recipes.toml", "r", made_entry(KEY, within_noise)).how == "as before"
    assert path.read_bytes() == before
    assert Store(tmp_path).record("a/x.recipes.toml", "r", made_entry(KEY, replace(RECORD, graphs={}))).how == "changed"
    file = parsed(Found(path.read_text(encoding="utf-8")))
    assert {entry.key.accelerator: entry.record.graphs for entry in file.entries} == {
        "sim": {},
        "cuda": {"transformer": 2},
    }


def test_a_renamed_recipe_takes_all_its_entries_along(tmp_path: Path) -> None:
    old = stored(tmp_path, (KEY, RECORD), (replace(KEY, accelerator="cuda"), RECORD))
    done = Store(tmp_path).record("a/x.recipes.toml", "new", made_entry(KEY, RECORD), moved_from="a/x/r.json")
    assert (done.how, done.was, old.exists()) == ("moved", "a/x/r.json", False)
    file = parsed(Found((tmp_path / "a/x/new.json").read_text(encoding="utf-8")))
    assert (file.recipe, len(file.entries)) == ("new", 2)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text[: len(text) // 2], "it is damaged: no JSON"),
        (lambda text: "", "it is damaged: no JSON"),
        (lambda text: "[]", "it is no baseline, or damaged: it has no schema_version"),
        (
            lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
            "it has schema version 2, of a newer release",
        ),
        (
            lambda text: text.replace('"schema_version": 1', '"schema_version": 0'),
            "it has schema version 0, of an unknown",
        ),
        (
            lambda text: text.replace('"count": 5', '"count": 50'),
            "entry 0 (sim (Simulated accelerator)) was changed by hand",
        ),
        (
            lambda text: text.replace('"count": 5', '"count": "many"'),
            "it is damaged: entries.0.record.recompiles.0.count: ",
        ),
        (lambda text: text.replace('"graphs"', '"grafs"'), "entry 0 (sim (Simulated accelerator)) was changed by hand"),
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_refused_with_the_reason(
    tmp_path: Path, damage: Any, told: str
) -> None:
    path = stored(tmp_path, (KEY, RECORD))
    damaged = damage(path.read_text(encoding="utf-8"))
    assert damaged != path.read_text(encoding="utf-8")
    with pytest.raises(BaselineError) as caught:
        parsed(Found(damaged))
    assert str(caught.value).startswith(told)
    path.write_text(damaged, encoding="utf-8")
    with pytest.raises(BaselineError):  # nor is it written over
        Store(tmp_path).record("a/x.recipes.toml", "r", made_entry(KEY, RECORD))
    assert path.read_text(encoding="utf-8") == damaged


def test_a_key_that_a_later_release_wrote_beside_does_no_harm_to_the_digest(tmp_path: Path) -> None:
    path = stored(tmp_path, (KEY, RECORD))
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["entries"][0]["record"]["tolerance_floor"]  # as an earlier release would have written it
    content = {name: value for name, value in data["entries"][0].items() if name != "digest"}
    import hashlib

    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    data["entries"][0]["digest"] = hashlib.sha256(text.encode()).hexdigest()
    assert parsed(Found(json.dumps(data))).entries[0].record.tolerance_floor == 0.0


def test_two_entries_of_one_key_are_refused(tmp_path: Path) -> None:
    data = json.loads(stored(tmp_path, (KEY, RECORD)).read_text(encoding="utf-8"))
    data["entries"] *= 2
    with pytest.raises(BaselineError, match="it has two entries for sim"):
        parsed(Found(json.dumps(data)))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_was_recorded_stands_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = stored(tmp_path, (KEY, RECORD))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        Store(tmp_path).record("a/x.recipes.toml", "r", made_entry(KEY, replace(RECORD, graphs={})))
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == ["r.json"]


def test_names_of_recipes_become_names_of_files() -> None:
    assert name_of("examples/x.recipes.toml", "flux nf4: a*b?") == "examples/x/flux nf4%3A a%2Ab%3F.json"


def test_reading_and_judging_stay_linear_in_recipes(tmp_path: Path) -> None:
    """A missing baseline is looked for under other names: by content, and not by reading all of them for each."""
    for number in range(60):
        recorded = made_entry(KEY, replace(RECORD, recipe={"pipeline": f"p{number}"}))
        Store(tmp_path).record("a/x.recipes.toml", f"old-{number}", recorded)
    reads: list[str] = []
    baselines = Baselines("base", read_all(tmp_path))
    import pytest_diffopt.baseline.judging as judging

    original = judging.parsed
    judging.parsed = lambda found: reads.append("") or original(found)  # type: ignore[func-returns-value, assignment]
    try:
        names = [f"new-{number}" for number in range(60)]
        for number, name in enumerate(names):
            record = replace(RECORD, recipe={"pipeline": f"p{number}"})
            assert f"old-{number}.json" in baselines.judge("a/x.recipes.toml", name, KEY, record, names).evidence[0]
    finally:
        judging.parsed = original
    assert len(reads) == 60


# verdicts


def judge(
    tmp_path: Path, record: Record = RECORD, key: Key = KEY, present: tuple[str, ...] = ("r",), recipe: str = "r"
) -> Any:
    return Baselines("base", read_all(tmp_path)).judge("a/x.recipes.toml", recipe, key, record, present)


COMMAND = "record it: pytest a/x.recipes.toml::r --diffopt-baseline=base --diffopt-update-baseline"


def test_as_recorded_passes(tmp_path: Path) -> None:
    stored(tmp_path, (KEY, RECORD))
    verdict = judge(tmp_path)
    assert (verdict.status, verdict.sentence) == ("passed", "everything is as recorded")
    assert verdict.figures["exact_key"] is True
    assert verdict.figures["recorded"]["peaks"]["call_bytes"] == 20 * MIB


def test_a_difference_fails_with_its_direction_and_the_command_that_records_it(tmp_path: Path) -> None:
    stored(tmp_path, (KEY, RECORD))
    verdict = judge(tmp_path, replace(RECORD, breaks=(), limits_exhausted=1))
    assert (verdict.status, verdict.sentence) == ("failed", "2 things not as recorded: 1 worse, 1 better")
    assert verdict.evidence[-1] == f"if this is meant, {COMMAND}"
    assert [one["direction"] for one in verdict.figures["differences"]] == ["worse", "better"]


def test_an_improvement_that_nobody_recorded_fails_too(tmp_path: Path) -> None:
    stored(tmp_path, (KEY, RECORD))
    assert judge(tmp_path, replace(RECORD, breaks=())).status == "failed"


def test_other_versions_are_named(tmp_path: Path) -> None:
    stored(tmp_path, (replace(KEY, versions={**VERSIONS, "torch": "2.12.0"}), RECORD))
    verdict = judge(tmp_path)
    assert (verdict.status, verdict.sentence) == ("passed", "everything is as recorded (recorded with torch 2.12.0)")
    assert verdict.figures["exact_key"] is False


def test_another_device_is_named_and_not_compared(tmp_path: Path) -> None:
    stored(tmp_path, (replace(KEY, accelerator="cuda", device="NVIDIA L4", capability=(8, 9)), RECORD))
    verdict = judge(tmp_path, replace(RECORD, breaks=()))
    assert verdict.status == "unverified"
    assert verdict.sentence == (
        "base/a/x/r.json has nothing for sim (Simulated accelerator); it was recorded on cuda (NVIDIA L4, capability 8.9), "
        "which is not compared"
    )
    assert verdict.evidence == (COMMAND,)


def test_a_missing_baseline_is_unverified_and_a_renamed_recipe_is_told(tmp_path: Path) -> None:
    stored(tmp_path, (KEY, RECORD))
    missing = judge(tmp_path, recipe="new", present=("r", "new"))
    assert (missing.status, missing.sentence) == ("unverified", "there is no baseline base/a/x/new.json")
    assert len(missing.evidence) == 1
    renamed = judge(tmp_path, recipe="new", present=("new",))
    assert renamed.evidence[0] == "base/a/x/r.json is of an equal recipe that is gone: recording moves it here"
    other = judge(tmp_path, replace(RECORD, recipe={"pipeline": "else"}), recipe="new", present=("new",))
    assert len(other.evidence) == 1


def test_a_damaged_file_fails_with_what_to_do(tmp_path: Path) -> None:
    stored(tmp_path, (KEY, RECORD)).write_text("{", encoding="utf-8")
    verdict = judge(tmp_path)
    assert verdict.status == "failed"
    assert verdict.sentence.startswith("base/a/x/r.json: it is damaged: no JSON")
    assert verdict.evidence[0] == "restore it from version control, or delete it and record it again"


def test_a_file_of_another_recipe_fails(tmp_path: Path) -> None:
    path = stored(tmp_path, (KEY, RECORD))
    path.rename(path.with_name("other.json"))
    verdict = judge(tmp_path, recipe="other")
    assert verdict.sentence == "base/a/x/other.json: it is of the recipe r in a/x.recipes.toml"
    assert verdict.status == "failed"


def strays(folder: Path, sources: dict[str, list[str]], *there: str, all_wanted: bool = False) -> list[str]:
    found = Baselines("base", read_all(folder)).strays(sources, there.__contains__, all_wanted=all_wanted)
    assert [sentence.partition(": ")[0] for sentence in found.values()] == [f"base/{name}" for name in found]
    return [sentence.partition(": ")[2] for sentence in found.values()]


def test_baselines_whose_recipe_or_file_is_gone_are_told(tmp_path: Path) -> None:
    stored(tmp_path, (KEY, RECORD))
    assert strays(tmp_path, {"a/x.recipes.toml": ["r"]}) == []
    assert strays(tmp_path, {"a/x.recipes.toml": ["new"]}) == [
        "a/x.recipes.toml has no recipe r any more; delete the file if that is meant"
    ]
    assert strays(tmp_path, {}) == ["its recipe file a/x.recipes.toml is gone; delete the file if that is meant"]


def test_a_baseline_whose_recipe_file_was_not_run_is_told_where_all_are_wanted(tmp_path: Path) -> None:
    stored(tmp_path, (KEY, RECORD))
    others = {"b.recipes.toml": ["r"]}
    assert strays(tmp_path, others, "a/x.recipes.toml") == []
    assert strays(tmp_path, others, "a/x.recipes.toml", all_wanted=True) == [
        "its recipe file a/x.recipes.toml was no part of the run"
    ]


def test_a_baseline_under_another_name_is_told(tmp_path: Path) -> None:
    path = stored(tmp_path, (KEY, RECORD))
    path.rename(path.with_name("copy.json"))
    assert strays(tmp_path, {"a/x.recipes.toml": ["r"]}) == [
        "it is of r in a/x.recipes.toml, whose baseline is base/a/x/r.json; delete the file if that is meant"
    ]


def test_a_damaged_file_that_no_recipe_is_held_against_is_told_and_another_tool_s_is_not(tmp_path: Path) -> None:
    path = stored(tmp_path, (KEY, RECORD))
    path.with_name("gone.json").write_text("{", encoding="utf-8")
    for name in ("report.json", "notes/x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (told,) = strays(tmp_path, {"a/x.recipes.toml": ["r"]})
    assert told.startswith("it is damaged: no JSON")
    assert told.endswith("; restore it from version control, or delete it and record it again")
    path.unlink()
    assert len(strays(tmp_path, {}, "a/x.recipes.toml")) == 1
    path.with_name("gone.json").unlink()
    assert len(strays(tmp_path, {}, "notes.recipes.toml")) == 1


def test_the_recipe_file_of_a_path_is_the_one_it_was_made_of() -> None:
    for source in ("a/x.recipes.toml", "x.recipes.toml", "a b/ü%.recipes.toml", "outside/x.recipes.toml"):
        assert source_of(name_of(source, "r/ö")) == source


def test_baselines_cross_processes_as_plain_data(tmp_path: Path) -> None:
    stored(tmp_path, (KEY, RECORD))
    baselines = Baselines("base", read_all(tmp_path))
    assert Baselines.from_plain(json.loads(json.dumps(baselines.to_plain()))) == baselines


# what the eager reference returned


def digest(component: str, step: int = 0, *, moved: float = 0.0, **changed: Any) -> OutputDigest:
    """One tensor, all of whose elements moved by a share of its size."""
    numbers = [1.0 + moved] * 16
    fields: dict[str, Any] = {
        "component": component,
        "step": step,
        "leaf": "0",
        "dtype": "float32",
        "shape": (1, 4, 64),
        "rms": 1.0 + moved,
        "noise": 2e-6,
        "samples": " ".join(map(str, numbers)),
        "sums": " ".join(str(16 * one) for one in numbers[:8]),
        "spacing": 2.0**-7,
        "rounding": 0.01,
        "gain": 1e-4,
    }
    return OutputDigest(**{**fields, **changed})


OUTPUTS = replace(
    RECORD, outputs=(digest("text_encoder"), digest("transformer"), digest("transformer", 1), digest("vae"))
)


def with_outputs(*outputs: OutputDigest) -> Record:
    return replace(RECORD, outputs=outputs)


@pytest.mark.parametrize("moved", [0.0, 1e-5, -1e-5])
def test_outputs_that_moved_within_their_noise_are_equal(moved: float) -> None:
    now = with_outputs(*(replace(digest(one.component, one.step, moved=moved)) for one in OUTPUTS.outputs or ()))
    assert differences(OUTPUTS, now, "sim") == []


@pytest.mark.parametrize("moved", [1e-4, -1e-4, 0.01])
def test_the_first_component_that_moved_is_worse_and_what_follows_from_it_is_not_counted(moved: float) -> None:
    names = ("text_encoder", 0), ("transformer", 0), ("transformer", 1), ("vae", 0)
    now = with_outputs(digest("text_encoder"), *(digest(name, step, moved=moved) for name, step in names[1:]))
    direction, line = one_difference(now, OUTPUTS)
    assert direction == "worse"
    assert line == (
        f"worse: change of the eager reference's output in transformer, step 0, the first to change (scaled by "
        f"{1 + moved:.4f}; up to 1.6e-05 of its size is rounding): 0 recorded, {abs(moved):.3g} now"
    )


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sums": " ".join(["17"] * 8)}, " (up to 1.6e-05 of its size is rounding): 0 recorded, 0.0625 now"),
        ({"shape": (1, 4, 32)}, ": its shape: [1, 4, 64] recorded, [1, 4, 32] now"),
        ({"dtype": "bfloat16"}, ": computed in: float32 recorded, bfloat16 now"),
        (
            {"rounding": 0.04},
            ": its rounding error in the recipe's dtype (up to 0.032 allowed): 0.01 recorded, 0.04 now",
        ),
        ({"gain": 0.01}, ": its scale in the recipe's dtype (±0.0075 allowed): 0.0001 recorded, 0.01 now"),
        ({"leaf": "1"}, ": there recorded, missing now"),
    ],
)
def test_whatever_else_moved_in_an_output_is_named(changed: dict[str, Any], told: str) -> None:
    now = with_outputs(digest("text_encoder", **changed), *(OUTPUTS.outputs or ())[1:])
    direction, line = one_difference(now, OUTPUTS)
    name = "text_encoder, step 0, the first to change"
    assert (direction, line) == ("worse", f"worse: change of the eager reference's output in {name}{told}")


def test_a_smaller_rounding_error_is_no_improvement_to_record() -> None:
    assert (
        differences(OUTPUTS, with_outputs(*(replace(one, rounding=0.001) for one in OUTPUTS.outputs or ())), "sim")
        == []
    )


def test_a_baseline_of_an_earlier_release_has_no_outputs_which_is_said_and_is_no_failure(tmp_path: Path) -> None:
    path = stored(tmp_path, (KEY, RECORD))
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["entries"][0]["record"]["outputs"]
    data["entries"][0]["digest"] = _digest(data["entries"][0])
    path.write_text(json.dumps(data), encoding="utf-8")
    verdict = judge(tmp_path, OUTPUTS)
    assert (verdict.status, verdict.sentence) == (
        "passed",
        "everything is as recorded; outputs were not recorded, so they are not compared",
    )
    assert verdict.evidence == (COMMAND,)
    assert Store(tmp_path).record("a/x.recipes.toml", "r", made_entry(KEY, OUTPUTS)).how == "changed"
    assert judge(tmp_path, OUTPUTS).sentence == "everything is as recorded"
    assert judge(tmp_path, RECORD).evidence[0] == "worse: outputs of the eager reference: 4 recorded, 0 now"


@pytest.mark.parametrize(
    ("edited", "told"),
    [
        (lambda outputs: outputs[0].update(rms=2.0), "entry 0 (sim (Simulated accelerator)) was changed by hand"),
        (
            lambda outputs: outputs[0].update(samples="1 2 3"),
            "it is damaged: entries.0.record.outputs.0: Value error, expected 16 finite numbers, got '1 2 3'",
        ),
        (lambda outputs: outputs[0].update(sums="nan " * 8), "it is damaged: entries.0.record.outputs.0: Value error"),
        (lambda outputs: outputs[0].pop("noise"), "it is damaged: entries.0.record.outputs.0.noise: Field required"),
    ],
)
def test_outputs_that_were_edited_by_hand_are_refused(tmp_path: Path, edited: Any, told: str) -> None:
    data = json.loads(stored(tmp_path, (KEY, OUTPUTS)).read_text(encoding="utf-8"))
    edited(data["entries"][0]["record"]["outputs"])
    with pytest.raises(BaselineError) as caught:
        parsed(Found(json.dumps(data)))
    assert str(caught.value).startswith(told)


# latency


def timed(seconds: tuple[float, ...], calls: tuple[float, ...]) -> Observation:
    return observation(
        timed_seconds=seconds, calls=tuple(CallRecord(place, "call", one) for place, one in enumerate(calls))
    )


def test_latency_is_a_ratio_to_eager_with_an_interval_that_holds_it() -> None:
    own = timed((0.5, 0.52, 0.48, 0.5, 0.51, 0.49, 0.5), (10.0, 0.6, 0.5))
    eager = timed((1.0, 1.02, 0.98, 1.0, 1.01, 0.99, 1.0), (2.0, 1.2, 1.0))
    found = latency_of(own, eager)
    assert found is not None
    assert found.steady is not None
    assert (found.steady.value, found.steady.low < 0.5 < found.steady.high) == (0.5, True)
    assert found.steady.high - found.steady.low < 0.05
    assert (found.cold, found.warm) == (Ratio(5.0, 3.333, 7.5), Ratio(0.5, 0.3333, 0.75))
    assert latency_of(own, eager) == found  # the same times, the same interval


def test_noisier_times_have_a_wider_interval() -> None:
    quiet = steady_ratio((1.0, 1.01, 0.99, 1.0, 1.0), (1.0, 1.01, 0.99, 1.0, 1.0))
    noisy = steady_ratio((1.0, 2.0, 0.5, 1.5, 0.7), (1.0, 2.0, 0.5, 1.5, 0.7))
    assert noisy.high - noisy.low > 5 * (quiet.high - quiet.low)


def test_what_was_not_timed_or_did_not_run_has_no_latency() -> None:
    own = timed((0.5,), (1.0, 1.0))
    assert latency_of(timed((), (1.0, 1.0)), own) is None
    assert latency_of(own, timed((), (1.0, 1.0))) is None
    assert latency_of(replace(own, failure=Failure("call 0", "RuntimeError", "it broke")), own) is None

"""Observation: everything written down while a recipe ran, as plain data that goes to JSON and back.

Bytes are bytes, seconds are seconds, calls are numbered from 0. Paths are relative to the import path that holds them,
so that an observation reads the same on every machine.
"""

from __future__ import annotations

import base64
import functools
import json
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pytest_diffopt.source_places import CodeFrame

if TYPE_CHECKING:
    import numpy as np
    from pydantic import TypeAdapter

SCHEMA_VERSION = 1

_MESSAGE_LINES = 5
"""Of an exception's message, beyond its first line."""

DISABLED = "nothing compiles:"
"""Begins a note that says what keeps Dynamo from compiling anything."""

PREPARING = -1
"""Stands for the call in what is compiled while the pipeline is prepared, before its first call."""

Outcome = Literal["compiled", "empty", "skipped", "limit", "failed"]


@dataclass(frozen=True)
class Place:
    """A place in source code."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        return f"{self.function} {self.file}:{self.line}" if self.function else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class FrameAttempt:
    """One attempt of Dynamo to compile a frame.

    Attributes:
        call: in which call of the pipeline, from 0; :data:`PREPARING` before the first.
        component, region: the component, and the module's path in it; both empty for code outside of any.
        outcome: ``compiled`` to at least one operation; ``empty``, compiled to no operation; ``skipped``, the whole
            frame runs eager; ``limit``, not compiled as a recompile limit is exhausted; ``failed``, an exception.
        graphs, operations: what was handed to the backend.
        guards: where it is a recompile, the guards of earlier compilations that failed, one of each.
    """

    call: int
    component: str
    region: str
    place: Place
    resumed: bool
    outcome: Outcome
    graphs: int = 0
    operations: int = 0
    recompile: bool = False
    guards: tuple[str, ...] = ()
    limit: str = ""
    reason: str = ""


@dataclass(frozen=True)
class GraphBreak:
    """One graph break: the user's code that broke, the frame it broke, why, and what Dynamo advises.

    ``skipped_frame`` is True where Dynamo gave the whole frame up: no counter of torch counts these.
    """

    call: int
    component: str
    region: str
    place: Place
    frame: Place
    reason: str
    explanation: str = ""
    hint: str = ""
    skipped_frame: bool = False
    stack: tuple[Place, ...] = ()


@dataclass(frozen=True)
class RegionRuns:
    """How often a compiled region was called in one call of the pipeline, and how often compiled code ran in it.

    Attributes:
        entries: calls of the compiled callable.
        engaged: entries in which a graph with operations, made from the code that was meant, ran.
        reasons: for entries that were not engaged, why, as far as Dynamo said so.
    """

    call: int
    component: str
    region: str
    place: Place
    entries: int
    engaged: int
    graph_runs: int
    operations: int
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompileRecord:
    """What the compile watch wrote down.

    Attributes:
        inlined: components that are a part of a graph of something else: what they return is seen by nobody there.
    """

    frames: tuple[FrameAttempt, ...] = ()
    graph_breaks: tuple[GraphBreak, ...] = ()
    regions: tuple[RegionRuns, ...] = ()
    graph_runs_outside: int = 0
    inlined: tuple[str, ...] = ()

    @property
    def graphs(self) -> int:
        """Graphs with operations that were compiled."""
        return sum(frame.graphs for frame in self.frames if frame.outcome == "compiled")

    @property
    def recompiles(self) -> tuple[FrameAttempt, ...]:
        """Attempts on code that had been compiled before."""
        return tuple(frame for frame in self.frames if frame.recompile)

    @property
    def limits(self) -> tuple[FrameAttempt, ...]:
        """Attempts refused because a recompile limit was exhausted: that code runs eager from then on."""
        return tuple(frame for frame in self.frames if frame.outcome == "limit")


@dataclass(frozen=True)
class Layer:
    """A Linear-like layer of a component.

    Attributes:
        path: inside the component.
        kind: the class, e.g. ``bitsandbytes.nn.modules.Linear4bit``.
        format: ``""`` where plain, else what its weight really holds: ``"nf4"``, ``"int8"``, ``"Q4_K"``, …;
            ``"unquantized"`` for a quantized class whose weight never was.
        dtype: of the stored weight.
        compute_dtype: of the multiplication, where the layer says.
        weight_bytes: of the stored weight; ``state_bytes``: of its inner tensors (``absmax``, ``SCB``, …).
        linear: False for a quantized table of embeddings.
        library: ``"bitsandbytes"``, ``"torchao"``, ``"quanto"``, ``"gguf"``, ``"layerwise_casting"``; ``""`` where plain.
        activations: the format into which each product quantizes them; ``""`` where it does not.
        granularity: of the scales, ``"PerTensor"``, ``"PerRow"`` or ``"PerGroup(128)"``, where the library says.
        adapter: whether it belongs to an adapter, such as a LoRA, and not to the model itself.
        parameters: the number of weights that the layer stands for (in_features × out_features).
    """

    component: str
    path: str
    kind: str
    format: str
    dtype: str
    compute_dtype: str
    in_features: int
    out_features: int
    weight_bytes: int
    state_bytes: int
    double_quantized: bool = False
    linear: bool = True
    library: str = ""
    activations: str = ""
    granularity: str = ""
    adapter: bool = False

    @property
    def parameters(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class OtherParameters:
    """Parameters of a component that belong to no quantized layer, summed by dtype."""

    component: str
    dtype: str
    count: int
    bytes: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """One tensor that came out: of a component (by name), of the pipeline (``component == ""``), or its inputs after.

    Attributes:
        call: in which call. step: which run of the component in that call, from 0.
        leaf: which tensor of the result, e.g. ``"0"`` or ``"images"``.
        finite: no NaN, no infinity. overwritten: a later call changed this very tensor.
        stride: 1 where every element is kept, else every stride-th of the flattened tensor; complex numbers count as two.
        sketch: where not every element is kept, sums of all of them under random signs, as ``values`` in float64.
        values: the elements as zlib-compressed little-endian float64 or float32, base64.
    """

    call: int
    component: str
    step: int
    leaf: str
    dtype: str
    shape: tuple[int, ...]
    finite: bool
    values: str
    width: Literal[4, 8] = 4
    stride: int = 1
    sketch: str = ""
    overwritten: bool = False

    @property
    def key(self) -> tuple[int, str, int, str]:
        return self.call, self.component, self.step, self.leaf

    def array(self) -> np.ndarray[Any, Any]:
        """The kept elements, flat, in float64."""
        import numpy as np

        raw = zlib.decompress(base64.b64decode(self.values))
        return np.frombuffer(raw, dtype="<f8" if self.width == 8 else "<f4").astype(np.float64)

    def sums(self) -> np.ndarray[Any, Any]:
        """The sketch, in float64; empty where every element is kept."""
        import numpy as np

        raw = zlib.decompress(base64.b64decode(self.sketch)) if self.sketch else b""
        return np.frombuffer(raw, dtype="<f8")


def encode_values(array: np.ndarray[Any, Any]) -> str:
    """The inverse of :meth:`Output.array`, for an array of little-endian float32 or float64."""
    return base64.b64encode(zlib.compress(array.tobytes(), 1)).decode("ascii")


@dataclass(frozen=True)
class CallRecord:
    """One call of the pipeline: its kind, what was asked, and how long it took (seconds, wall clock).

    ``inputs`` is a digest of what went in: equal for calls with equal inputs.
    """

    index: int
    kind: Literal["call", "sensitivity"]
    seconds: float
    prompt: str = ""
    size: tuple[int, ...] = ()
    steps: int = 0
    inputs: str = ""


@dataclass(frozen=True)
class Executions:
    """How often a module ran in one call, counted in an eager run: a component itself (``region == ""``) or a block."""

    call: int
    component: str
    region: str
    count: int


@dataclass(frozen=True)
class Holder:
    """Who keeps memory of the accelerator beside the weights.

    Attributes:
        kind: ``graph``, of autograd, with the names of what made its last tensors; ``module``, of something else, with its
            class; ``cache``, of the component that is named.
        bytes: that Python can see; what a graph saved for the gradients comes on top.
    """

    kind: Literal["graph", "module", "cache"]
    name: str
    bytes: int


@dataclass(frozen=True)
class CallMemory:
    """Memory of the accelerator around one call, in bytes.

    Attributes:
        peak_bytes: the highest during the call. live_bytes: after it, without the results that the observation holds.
        residency: component → bytes of its weights that are on the accelerator after the call: parameters, buffers and
            the inner tensors of quantization.
        staying: component → the first few names of these. weights_bytes: of all of these, what components share once.
        buffers: component → bytes of its buffers alone that are there.
        elsewhere_bytes: the highest during the call on other devices of the same kind, beyond what was there before.
        tables_bytes: of tables of positions that functions of the libraries keep there from call to call.
        h2d_bytes, d2h_bytes: copied to the device and back during the call; None where it does not count them.
        host_bytes, host_peak_bytes: what torch's allocators hold of the host after it, and the most during it, beyond what
            there was before the pipeline and what the observation holds; weights in mapped files count. None where
            nobody counts it.
        holders: who keeps what stays beside the weights, where something does and it could be found.
        repeated: an extra call, one of the recipe's own again, made because more was kept after it than before.
        inputs: a digest; calls with the same one were given the same.
    """

    call: int
    peak_bytes: int
    live_bytes: int
    residency: dict[str, int] = field(default_factory=dict)
    staying: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights_bytes: int = 0
    buffers: dict[str, int] = field(default_factory=dict)
    elsewhere_bytes: int = 0
    tables_bytes: int = 0
    h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    host_bytes: int | None = None
    host_peak_bytes: int | None = None
    holders: tuple[Holder, ...] = ()
    repeated: bool = False
    inputs: str = ""


@dataclass(frozen=True, order=True)
class Owner:
    """Whose bytes they are.

    Attributes:
        component: or ``""`` where no component's.
        kind: ``weights``; ``working``, taken while the component ran; ``other``, taken while none ran; ``before``, what
            was there before the pipeline.
    """

    component: str
    kind: Literal["weights", "working", "other", "before"]

    def __str__(self) -> str:
        if self.kind == "before":
            return "held before the pipeline"
        return f"{self.component} {self.kind}".strip()


@dataclass(frozen=True)
class PhaseResidency:
    """A phase of a run (``loading``, ``call 0``, …) and its peak.

    Attributes:
        first, last: its positions; the position n is the moment after n blocks came or went.
        peak_at: the position of the peak. peak_bytes: then on the accelerator.
        component, operation: what took the memory that made the peak; both empty where it was there when the phase began.
        weights: component → the most bytes of its weights at once. working: the same of its working memory.
        at_work: component → the most bytes beside weights while it ran, whoever took them.
        products: component → how many blocks operations made that take weights, such as matrix products.
        beside: component → other component → the bytes of the other's weights at the end of its last run.
    """

    phase: str
    first: int
    last: int
    peak_at: int
    peak_bytes: int
    component: str = ""
    operation: str = ""
    weights: dict[str, int] = field(default_factory=dict)
    working: dict[str, int] = field(default_factory=dict)
    at_work: dict[str, int] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)
    beside: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Residency:
    """Whose bytes were on the accelerator, over time.

    Attributes:
        owners: in the order of the columns of ``bytes``.
        positions: the moments that are kept, some hundreds, among them each phase's first, last and peak.
        bytes: a row a position, a column an owner; the sum of a row is what was live.
    """

    owners: tuple[Owner, ...] = ()
    phases: tuple[PhaseResidency, ...] = ()
    positions: tuple[int, ...] = ()
    bytes: tuple[tuple[int, ...], ...] = ()

    def at(self, position: int) -> dict[Owner, int]:
        """Who held how many bytes at a kept position, the largest first; those who held nothing are left out."""
        row = self.bytes[self.positions.index(position)]
        held = {owner: count for owner, count in zip(self.owners, row, strict=True) if count}
        return dict(sorted(held.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class MemoryRecord:
    """Memory of the accelerator, in bytes: while the pipeline was prepared, and call by call.

    Attributes:
        before_bytes: what others held before the pipeline was prepared; every figure but ``loaded_residency`` includes it.
        load_peak_bytes: the highest while it was prepared. loaded_bytes: when it was.
        loaded_residency: component → bytes of its weights on the accelerator when it was prepared.
        residency: None where the device does not tell who takes its memory.
        kept_results_bytes: of the results of all own calls, still there once the observation held them no more: the
            pipeline keeps them as well.
        load_host_peak_bytes: as a call's ``host_peak_bytes``, while it was prepared.
    """

    before_bytes: int
    load_peak_bytes: int
    loaded_bytes: int
    calls: tuple[CallMemory, ...] = ()
    loaded_residency: dict[str, int] = field(default_factory=dict)
    residency: Residency | None = None
    kept_results_bytes: int = 0
    load_host_peak_bytes: int | None = None

    @property
    def call_peak_bytes(self) -> int:
        """The highest peak of any call, above what others held before."""
        return max((call.peak_bytes for call in self.calls), default=self.before_bytes) - self.before_bytes

    @property
    def transferred_bytes(self) -> tuple[int, int] | None:
        """(host to device, device to host) in the last own call; None where the device does not count that."""
        own = [call for call in self.calls if not call.repeated and call.h2d_bytes is not None]
        return (own[-1].h2d_bytes or 0, own[-1].d2h_bytes or 0) if own else None


@dataclass(frozen=True)
class AttentionUse:
    """An attention layer in one call, seen in an eager run.

    Attributes:
        region: its path in the component. processor: the class of its processor.
        told: whether the processor can be told a backend.
        runs: of the layer. backends: by which backends of diffusers' dispatcher it attended, and how often.
    """

    call: int
    component: str
    region: str
    processor: str
    told: bool
    runs: int
    backends: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheUse:
    """A component's cache in one call, seen in an eager run.

    Attributes:
        hooks: that were entered. entered: how often, all of them. computed: of these, how often the module itself ran.
        stale: hooks that reused something where the call first came to them: another call had left it.
    """

    call: int
    component: str
    hooks: int
    entered: int
    computed: int
    stale: int = 0


@dataclass(frozen=True)
class CacheState:
    """A component's cache as it stood: its kind (``""`` for none), its hooks before the calls and after, and the paths of the
    parts that have them, the component itself apart."""

    component: str
    kind: str
    hooks: int
    hooks_after: int
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class HostWait:
    """A place at which the host waited for the accelerator.

    Attributes:
        call: the recipe's own, from 0.
        step: the denoising step, from 0; -1 before the first and after the last.
        component: whose code waited; empty for the pipeline's own.
        operation: that waited, e.g. ``"aten::_local_scalar_dense"`` for ``.item()`` and ``bool()``.
        place: the innermost line that is not torch's; None where there is none.
        user: the innermost line of the user's own code, where that is another.
        offloading: whether the place is the offloading's own code, which moves weights and inputs.
        count: how often, in this step.
    """

    call: int
    step: int
    component: str
    operation: str
    place: CodeFrame | None = None
    user: CodeFrame | None = None
    offloading: bool = False
    count: int = 1


@dataclass(frozen=True)
class HostSyncs:
    """Where the host waited for the accelerator in the recipe's own calls.

    Attributes:
        steps: the denoising steps of each call.
    """

    steps: tuple[int, ...] = ()
    waits: tuple[HostWait, ...] = ()

    def per_step(self, call: int) -> list[int]:
        """How often the host waited in each denoising step of a call, offloading apart."""
        counts = [0] * self.steps[call]
        for wait in self.waits:
            if wait.call == call and wait.step >= 0 and not wait.offloading:
                counts[wait.step] += wait.count
        return counts


@dataclass(frozen=True)
class StateChange:
    """A global that is not as it was: its name, before and after, and what left it so."""

    name: str
    before: str
    after: str
    phase: str


@dataclass(frozen=True)
class Failure:
    """An exception that ended the run of a recipe.

    Attributes:
        phase: ``preparing``, ``call 0``, …, ``releasing``.
        error, message: its class, and its own words.
        place: ``file:line, in function``, the innermost of the user's own code; empty where none of that ran.
        traceback: the whole, with short paths.
        component: that ran when it was raised; empty where none did.
        raised_at: ``place`` as data; None where that is empty.
        frames: the last of the user's code and of the libraries', the outermost first.
        behind: its causes, a line each, with their places.
    """

    phase: str
    error: str
    message: str
    place: str = ""
    traceback: tuple[str, ...] = ()
    component: str = ""
    raised_at: CodeFrame | None = None
    frames: tuple[CodeFrame, ...] = ()
    behind: tuple[str, ...] = ()

    def __str__(self) -> str:
        first = self.message.strip().splitlines()[0] if self.message.strip() else ""
        return f"{self.error}: {first}" if first else self.error

    @property
    def spoken_phase(self) -> str:
        """While what it ended: ``preparing``, ``running call 0, in transformer``."""
        words = self.phase if self.phase in ("preparing", "releasing") else f"running {self.phase}"
        return f"{words}, in {self.component}" if self.component else words

    @property
    def lines(self) -> list[str]:
        """Where it was raised, what is behind it, and what else it says, a line each."""
        places = [str(frame) for frame in self.frames] or ([self.place] if self.place else [])
        message = [line.rstrip() for line in self.message.strip().splitlines()[1:] if line.strip()]
        return [*places, *self.behind, *message[:_MESSAGE_LINES]]


@dataclass(frozen=True)
class ComponentRecord:
    """A component: its class, its parameters' bytes, and what is compiled in it.

    Attributes:
        blocks: path → class of the blocks that repeat in it.
        compiled: paths whose call enters a compiled region; ``""`` is the component itself.
        siblings_not_compiled: classes of blocks beside compiled ones that are not compiled.
        disabled: compiled paths whose forward Dynamo is told to leave alone.
        kept_plain, kept_float32: modules that the libraries leave unquantized, or in float32, by their own lists.
        kept_resident: the pipeline's class keeps it on the accelerator when it is offloaded.
        stays_until: the component whose run sends it away, by the chain of a class of diffusers; empty where it stays until
            the call ends, None where no such class offloads it.
        buffer_bytes: of its buffers.
        own_exclusions: modules that its library keeps out of quantization where the recipe gives no list.
        names_no_blocks: it is a model of diffusers whose ``compile_repeated_blocks()`` refuses, as it names no blocks.
        types_of_file: path of a Linear layer → its weight's type in the ``.gguf`` file that it was loaded from.
        shared_bytes: of its parameters, those that a component before it holds too.
    """

    name: str
    kind: str
    bytes: int
    blocks: dict[str, str] = field(default_factory=dict)
    compiled: tuple[str, ...] = ()
    siblings_not_compiled: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()
    kept_plain: tuple[str, ...] = ()
    kept_float32: tuple[str, ...] = ()
    kept_resident: bool = False
    stays_until: str | None = None
    names_no_blocks: bool = False
    own_exclusions: tuple[str, ...] = ()
    buffer_bytes: int = 0
    shared_bytes: int = 0
    types_of_file: dict[str, str] = field(default_factory=dict)

    @property
    def own_bytes(self) -> int:
        """Its parameters' bytes that no component before it holds."""
        return self.bytes - self.shared_bytes


@dataclass(frozen=True)
class Observation:
    """Everything written down while a recipe ran; see the fields' own types.

    Attributes:
        recipe: the recipe as plain data. content_hash: of what was observed, see :attr:`Recipe.content_hash`.
        accelerator: the device's kind (``"cuda"``, ``"cpu"``, …). device: its name.
        versions: of python, torch and the libraries.
        layers_after: layers that the calls left otherwise than they were.
        precise_outputs: of the same calls, eager, in a higher precision, where asked for and possible.
        notes: warnings of libraries, and what could not be observed.
        memory: of the accelerator; None where it does not count it.
        attention_uses, cache_uses: where the recipe sets these, and in an eager run alone.
        attention_after: component → the backend that its processors would use after the calls, or several; only of
            components whose processors can be told.
        timed_seconds: of further calls, with the inputs of the last own one, in which nothing else was written down; where
            they were asked for.
        host_syncs: where the host waited for the accelerator; None where that does not tell.
        failure: what ended the run, or None.
    """

    recipe: dict[str, Any]
    content_hash: str
    accelerator: str
    device: str
    versions: dict[str, str]
    components: tuple[ComponentRecord, ...] = ()
    calls: tuple[CallRecord, ...] = ()
    compiles: CompileRecord = CompileRecord()
    layers: tuple[Layer, ...] = ()
    other_parameters: tuple[OtherParameters, ...] = ()
    layers_after: tuple[Layer, ...] = ()
    outputs: tuple[Output, ...] = ()
    precise_outputs: tuple[Output, ...] = ()
    precise_dtype: str = ""
    executions: tuple[Executions, ...] = ()
    state_changes: tuple[StateChange, ...] = ()
    failure: Failure | None = None
    notes: tuple[str, ...] = ()
    memory: MemoryRecord | None = None
    attention_uses: tuple[AttentionUse, ...] = ()
    attention_after: dict[str, str] = field(default_factory=dict)
    cache_uses: tuple[CacheUse, ...] = ()
    caches: tuple[CacheState, ...] = ()
    timed_seconds: tuple[float, ...] = ()
    host_syncs: HostSyncs | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def peak_bytes(self) -> int | None:
        """The accelerator's peak during the calls; None where it does not count."""
        return self.memory.call_peak_bytes if self.memory is not None else None

    @property
    def name(self) -> str:
        return str(self.recipe.get("name", ""))

    def to_json(self) -> str:
        """The whole observation as JSON text."""
        return _adapter().dump_json(self).decode("utf-8")

    @classmethod
    def from_json(cls, text: str) -> Observation:
        """The inverse of :meth:`to_json`. Raises ValueError where the text is of another schema version, or damaged."""
        found = json.loads(text).get("schema_version")
        if found != SCHEMA_VERSION:
            raise ValueError(f"observation: found schema version {found!r}; this release reads {SCHEMA_VERSION}")
        return _adapter().validate_json(text)


@functools.lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[Observation]:
    from pydantic import TypeAdapter

    return TypeAdapter(Observation)

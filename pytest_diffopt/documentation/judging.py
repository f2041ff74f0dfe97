"""Verdicts of a block, out of its runs: pure functions, as the checks are.

Two checks are the block's own. ``run`` says whether it ran to its end. ``use`` says whether what it configured was used:
no exception is not a pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pytest_diffopt.checks import checks_for, crashes
from pytest_diffopt.checks.evidence import Evidence
from pytest_diffopt.checks.session import CHECKS, limits_of
from pytest_diffopt.checks.verdict import Verdict
from pytest_diffopt.documentation.live_recipe import configured
from pytest_diffopt.extras import needs

if TYPE_CHECKING:
    from pytest_diffopt.documentation.pages import Block
    from pytest_diffopt.documentation.record import BlockRun, Raised, Variant
    from pytest_diffopt.recipe import Recipe

RUN, USE = "run", "use"

Status = Literal["passed", "failed", "unverified", "skipped"]

_NOT_OF_A_BLOCK = ("state", "forecast")
"""Checks that say nothing of a block: it has a process to itself, and what it sets there is its own affair."""

_OWN_MISTAKES = (
    "NameError",
    "UnboundLocalError",
    "AttributeError",
    "TypeError",
    "SyntaxError",
    "IndexError",
    "KeyError",
)
_OPTIONAL = ("ImportError", "ModuleNotFoundError")
_NETWORK = (
    *("ConnectionError", "ConnectTimeout", "URLError", "gaierror", "MaxRetryError", "OfflineModeIsEnabled"),
    *("ConnectError", "ProxyError", "NewConnectionError"),
)
_REPOSITORY = (
    "LocalEntryNotFoundError",
    "RepositoryNotFoundError",
    "EntryNotFoundError",
    "HFValidationError",
    "OSError",
)
_HARDWARE = re.compile(
    r"(?i)compute capability|requires? (?:a |an )?(?:cuda|nvidia|gpu|hopper|ampere)|"
    r"(?:cuda|nvidia|gpu)\b.{0,40}\b(?:is required|is needed|not available|unavailable|not found)|"
    r"torch not compiled with cuda|no nvidia driver|found no nvidia"
)
_NO_SUCH_DEVICE_CALL = re.compile(r"module 'torch\.(?:cuda|cpu|mps|xpu)[.\w]*' has no attribute '(\w+)'")
_NO_FILE = re.compile(r"does not appear to have a file named [`'\"]?([\w.-]+\.\w+)")
_NEEDS_A_NAME = "When using the offline mode, you must specify a `weight_name`"
"""diffusers, where it would ask the hub which of a repository's files is the LoRA."""

_PLACEHOLDER = re.compile(r"/?(?:path/to|your/path|path_to)/[\w./-]*")
_PLACEHOLDER_OWNER = re.compile(
    r"(?<![a-z0-9])(?:user|user[-_]?names?|your(?:[-_]?(?:user|org|own))?(?:[-_]?name)?|org[-_]?names?|name[-_]?space)(?![a-z0-9])"
)
_MISSING_PACKAGE = re.compile(
    r"requires the (?P<a>[\w.-]+) library|[Rr]equires (?P<c>[a-z][\w.-]+) ?[><=]=|"
    r"pip install (?:-U |--upgrade )?[`'\"]?(?P<b>[a-zA-Z][\w.-]+)"
)


@dataclass(frozen=True)
class BlockVerdict:
    """What is said of one block.

    Attributes:
        status: the worst of its verdicts; ``skipped`` where it cannot run here.
        sentence: why, in one sentence.
        verdicts: of every check that applies.
        recipe: that was read off the block; None where there is none.
        toml: the recipe's text.
        notes: what was made small, what stood for something else, what a recipe cannot say.
    """

    block: Block
    status: Status
    sentence: str
    verdicts: tuple[Verdict, ...] = ()
    recipe: Recipe | None = None
    toml: str = ""
    notes: tuple[str, ...] = ()
    run: BlockRun | None = None


def references_for(run: BlockRun) -> tuple[Variant, ...]:
    """Which other runs of a block its verdicts need."""
    recipe = run.read_recipe()
    if run.ended != "ran" or recipe is None or not run.called:
        return ()
    compiled, offloaded = bool(recipe.compilation), recipe.offloading is not None
    return (*(("eager",) if compiled or offloaded else ()), *(("resident",) if compiled and offloaded else ()))


def cannot_run(block: Block, why: str) -> BlockVerdict:
    """A block that is not run here."""
    return BlockVerdict(block, "skipped", why)


def is_wrong(block: Block, name: str, why: str) -> BlockVerdict:
    """A block that is no block: the page itself is wrong."""
    return BlockVerdict(block, "failed", why, (Verdict(RUN, name, "failed", why),))


def judge_block(
    block: Block,
    name: str,
    run: BlockRun,
    references: Mapping[Variant, BlockRun],
    *,
    resolves: Callable[[str], bool],
    installed: Callable[[str], bool],
    ids: Sequence[str] = (),
    source: str = "",
) -> BlockVerdict:
    """The verdict of a block.

    Args:
        name: of its recipe.
        run: the block as it is written. references: its other runs, see :func:`references_for`.
        resolves: whether a hub id stands for something here. installed: whether a module can be imported.
        ids: the hub ids that the block names. source: its text, with that of the blocks that run before it.
    """
    notes = _notes(run)
    if run.ended != "ran":
        status, sentence, evidence = _did_not_run(block, run, resolves, installed, ids, source)
        if status == "skipped":
            return BlockVerdict(block, status, sentence, notes=notes, run=run)
        verdict = Verdict(RUN, name, status, sentence, {}, evidence)
        return BlockVerdict(block, status, sentence, (verdict,), notes=notes, run=run)
    recipe = run.read_recipe()
    verdicts = [Verdict(RUN, name, "passed", f"it ran to its end in {run.seconds:.1f} s")]
    verdicts.append(_use(name, run, recipe))
    if recipe is not None:
        verdicts += _checks(recipe, run, references)
    return _summed_up(block, verdicts, recipe, run, notes)


def _summed_up(
    block: Block, verdicts: list[Verdict], recipe: Recipe | None, run: BlockRun, notes: tuple[str, ...]
) -> BlockVerdict:
    order: tuple[Status, ...] = ("failed", "unverified", "passed")
    status = next(one for one in order if any(verdict.status == one for verdict in verdicts))
    telling = [verdict for verdict in verdicts if verdict.status == status]
    if status == "passed":
        parts = configured(recipe) if recipe is not None else ()
        checked = ", ".join(verdict.check for verdict in verdicts if verdict.check != RUN)
        sentence = f"{' + '.join(parts) or 'the plain pipeline'}: {checked}"
    else:
        sentence = "; ".join(f"{verdict.check}: {verdict.sentence}" for verdict in telling)
    return BlockVerdict(block, status, sentence, tuple(verdicts), recipe, run.toml, notes, run)


def _notes(run: BlockRun) -> tuple[str, ...]:
    notes = [f"made small: {', '.join(run.shrunk)}"] if run.shrunk else []
    notes += [f"a generated picture stands for {address}" for address in run.pictures]
    notes += [f"{path} is not encoded: nothing that does it is installed" for path in run.not_encoded]
    return (*notes, *run.beside)


# Whether it ran.


def _did_not_run(
    block: Block,
    run: BlockRun,
    resolves: Callable[[str], bool],
    installed: Callable[[str], bool],
    ids: Sequence[str],
    source: str,
) -> tuple[Status, str, tuple[str, ...]]:
    raised = run.raised
    if run.own_code_ended:
        return "unverified", run.how, ()
    if raised is None:
        return "failed", run.how, tuple(run.output.splitlines()[-3:])
    where = f"line {raised.line}: " if raised.line else ""
    evidence = _evidence(raised)
    if reason := _not_here(raised, resolves, installed, ids, source):
        return "skipped", reason, ()
    if 0 < raised.line < block.line:
        return "unverified", f"an earlier block that it needs fails in {where}{raised}", evidence
    if "PermissionError" in raised.kinds or "Permission denied" in raised.message:
        return "unverified", f"{where}it writes outside of its own folder, which is refused here ({raised})", evidence
    if _HARDWARE.search(raised.message):
        return "unverified", f"{where}it asks for hardware that is not here ({raised})", evidence
    if "AttributeError" in raised.kinds and (match := _NO_SUCH_DEVICE_CALL.search(raised.message)):
        return "unverified", f"{where}the device in use has nothing like torch.cuda's {match[1]} ({raised})", evidence
    if "NotImplementedError" in raised.kinds and raised.message.startswith("The simulated GPU has no"):
        return "unverified", f"{where}the simulated GPU cannot do it ({raised})", evidence
    return "failed", f"{where}{raised}", evidence


def _evidence(raised: Raised) -> tuple[str, ...]:
    lines = [line.strip() for line in raised.message.splitlines() if line.strip()][1:4]
    return tuple(lines)


def _not_here(
    raised: Raised,
    resolves: Callable[[str], bool],
    installed: Callable[[str], bool],
    ids: Sequence[str],
    source: str,
) -> str:
    """Why it cannot run on this machine, through no fault of the page's; empty where it could."""
    if "ModuleNotFoundError" in raised.kinds and raised.missing and not installed(raised.missing.partition(".")[0]):
        return needs(raised.missing.partition(".")[0])
    match = _MISSING_PACKAGE.search(raised.message)
    package = (match["a"] or match["b"] or match["c"]) if match else ""
    if package and not installed(package):
        return needs(package)
    if "PEFT backend is required" in raised.message and not installed("peft"):
        return needs("peft")
    if _NEEDS_A_NAME in raised.message:
        lora = next((one for one in ids if not resolves(one)), "")
        return f"no replica stands for {lora!r}{_placeholder(lora)}" if lora else f"needs the network ({raised})"
    if "OSError" in raised.kinds and (match := _PLACEHOLDER.search(raised.message)):
        return f"{match[0]} is a placeholder: nothing is there"
    if any(kind in _NETWORK for kind in raised.kinds):
        return f"needs the network ({raised.error})"
    if any(kind in _REPOSITORY for kind in raised.kinds):
        unknown = [one for one in ids if not resolves(one) and one in raised.message]
        if unknown:
            return f"no replica stands for {unknown[0]!r}{_placeholder(unknown[0])}"
        file = _NO_FILE.search(raised.message)
        if file and file[1] in source:
            return f"needs {file[1]}, which no replica has"
        if "outgoing traffic has been disabled" in raised.message or "offline mode" in raised.message.lower():
            return f"needs a file of the hub that no replica has ({raised.first_line})"
    return ""


def _placeholder(hub_id: str) -> str:
    """Whole words of the owner: "diffusers" has a "user" in it and is a real one."""
    owner = hub_id.partition("/")[0].casefold()
    return ": it is a placeholder" if owner == "path" or _PLACEHOLDER_OWNER.search(owner) else ""


# Whether what it configured was used.


def _use(name: str, run: BlockRun, recipe: Recipe | None) -> Verdict:
    problems: list[str] = []
    failed = False
    for error in run.swallowed:
        where = f"line {error.line}"
        if error.error in _OWN_MISTAKES:
            failed = True
            problems.append(f"{where} fails, and the block hides it: {error}")
        elif error.error not in _OPTIONAL:
            problems.append(f"{where} fails, and the block handles it: {error}")
    if run.not_there:
        failed = True
        problems += run.not_there
    told = len(problems)
    problems += run.idle
    parts = configured(recipe) if recipe is not None else ()
    if not run.called and not run.idle:
        what = f"{' and '.join(parts)} is configured" if parts else "it configures nothing that could be judged"
        problems.append(f"{what}, and no pipeline is called")
    if run.called and run.device_bytes == 0:
        problems.append(f"nothing was ever put on the accelerator ({run.accelerator}): everything ran on the host")
    problems += run.not_judged
    if run.recipe_error:
        problems.append(f"what is set on the pipeline is no recipe: {run.recipe_error.splitlines()[-1].strip()}")
    if failed:
        problems = problems[:told]
    if problems:
        return Verdict(USE, name, "failed" if failed else "unverified", "; ".join(problems))
    return Verdict(USE, name, "passed", f"{', '.join(run.called)} was called on {run.accelerator}")


# The checks of a recipe.


def _checks(recipe: Recipe, run: BlockRun, references: Mapping[Variant, BlockRun]) -> list[Verdict]:
    observation = run.read_observation()
    if observation is None:
        return []
    eager = references.get("eager")
    resident = references.get("resident", eager if not recipe.compilation else None)
    reference = eager.read_observation() if eager is not None else observation
    given = Evidence(
        recipe, observation, limits_of(recipe), reference, resident.read_observation() if resident is not None else None
    )
    names = [name for name in checks_for(recipe) if name not in _NOT_OF_A_BLOCK]
    if not run.called:
        names = [name for name in names if name == "quantization"]  # that needs no call
    found = crashes.with_cause_once([CHECKS[name](given) for name in names], observation.failure)
    wrong = [
        f"the {variant} run of the block: {_ending(one)}" for variant, one in references.items() if one.ended != "ran"
    ]
    return [replace(one, evidence=(*one.evidence, *wrong)) if one.status != "passed" else one for one in found]


def _ending(run: BlockRun) -> str:
    return str(run.raised) if run.raised is not None else run.how

"""What a page's shell blocks install with pip, and whether it is installed here."""

from __future__ import annotations

import re
import shlex
from importlib import metadata

from pytest_diffopt.extras import needs

_INSTALL = re.compile(r"^[\s$!%>]*(?:(?:sudo|uv|python3?|py)\s+(?:-m\s+)?)?pip3?\s+install\s+(?P<rest>.*)$")
_WITH_VALUE = {
    *("-i", "--index-url", "--extra-index-url", "-f", "--find-links", "-r", "--requirement", "-c", "--constraint"),
    *("-t", "--target", "-e", "--editable", "--python-version", "--platform", "--prefix", "--root", "--python"),
    *("--config-settings", "--global-option"),
}
_REPOSITORY = re.compile(r"^(?:git|hg)\+.*?/(?P<name>[\w.-]+?)(?:\.git)?(?:@.*)?(?:#.*)?$")
_EGG = re.compile(r"#.*\begg=(?P<name>[\w.-]+)")


def pip_requirements(script: str) -> tuple[str, ...]:
    """The requirements of a script's ``pip install`` lines, as ``name[extra]>=1``; what is no requirement is left out."""
    found: list[str] = []
    for line in script.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|\|\||;(?=\s)", line):
            if match := _INSTALL.match(command):
                found += _arguments(match["rest"])
    return tuple(dict.fromkeys(found))


def _arguments(rest: str) -> list[str]:
    try:
        words = shlex.split(re.sub(r"\s#.*", "", rest))  # in an address it is no comment
    except ValueError:  # a quote that is never closed
        return []
    found: list[str] = []
    skip = False
    for word in words:
        if skip or word.startswith("-"):
            skip = not skip and word in _WITH_VALUE
        elif match := _EGG.search(word) or _REPOSITORY.match(word):
            found.append(match["name"])
        elif "://" not in word and not word.startswith((".", "/", "~", "<")):
            found.append(word)
    return found


def missing(requirements: tuple[str, ...]) -> str:
    """Why the requirements are not met here, in words; empty where they are."""
    reasons = []
    for text in requirements:
        if reason := _missing(text):
            reasons.append(reason)
    return "; ".join(reasons)


def _missing(text: str) -> str:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        return ""  # a placeholder, or what only a shell expands
    if requirement.marker is not None and not requirement.marker.evaluate():
        return ""
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return needs(requirement.name)
    if not requirement.specifier.contains(installed, prereleases=True):
        return f"needs {requirement.name}{requirement.specifier}; {installed} is installed"
    return ""

"""Checks the licence of everything installed that this project needs, direct or transitive: `make lint`.

What ships (the project's dependencies, with those of its extras) has no copyleft. What only builds and tests (the group
`dev`) may besides be under the MPL, whose copyleft ends at the file. A licence that is not named here fails too:
somebody looks at it, and adds it.
"""

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PERMISSIVE = frozenset(
    {"0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CNRI-Python", "ISC", "MIT", "PSF-2.0", "Python-2.0"}
    | {"Unlicense", "Zlib"}
)
FILE_LEVEL = frozenset({"MPL-2.0"})

# What packages write that have no `License-Expression` (PEP 639) yet.
_SPELLINGS = {
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
_APPROVED = "License :: OSI Approved :: "


def licence_of(package: Distribution) -> str:
    """The SPDX expression of a distribution, or what it says in its own words; empty when it says nothing."""
    metadata = package.metadata
    if expressions := metadata.get_all("License-Expression"):
        return str(expressions[0])
    classifiers = [
        line.removeprefix(_APPROVED) for line in metadata.get_all("Classifier", []) if line.startswith(_APPROVED)
    ]
    # Several classifiers do not say whether they are a choice, so each of them has to be acceptable.
    stated = classifiers or metadata.get_all("License") or [""]
    return " AND ".join(_SPELLINGS.get(words, words) for words in stated)


def is_permitted(expression: str, permitted: frozenset[str]) -> bool:
    """Whether an SPDX expression can be met with the given licences only: all of an AND, one of an OR.

    What is no SPDX expression is not permitted; neither is a licence WITH an exception, which nothing here needs.
    """
    try:
        tokens = re.findall(r"[()]|[^()\s]+", canonicalize_license_expression(expression))
    except InvalidLicenseExpression:
        return False

    def either() -> bool:
        met = both()
        while tokens[:1] == ["OR"]:
            tokens.pop(0)
            met |= both()
        return met

    def both() -> bool:
        met = single()
        while tokens[:1] == ["AND"]:
            tokens.pop(0)
            met &= single()
        return met

    def single() -> bool:
        word = tokens.pop(0)
        if word != "(":
            return word in permitted
        met = either()
        tokens.pop(0)
        return met

    return either() and not tokens


def closure(requirements: Iterable[str]) -> Iterator[Distribution]:
    """The installed distributions that the requirements lead to on this platform, each once.

    Raises:
        PackageNotFoundError: one that is needed here is not installed.
    """
    waiting = [(Requirement(text), "") for text in requirements]
    seen: set[tuple[str, str]] = set()
    found: set[str] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        package = distribution(name)
        if name not in found:
            found.add(name)
            yield package
        for wanted in {"", *requirement.extras} - {known for seen_name, known in seen if seen_name == name}:
            seen.add((name, wanted))
            waiting += [(Requirement(text), wanted) for text in package.requires or []]


def complaints(requirements: Iterable[str], permitted: frozenset[str]) -> list[str]:
    """One line for each distribution of the closure whose licence is not permitted, sorted."""
    licences = {package.name: licence_of(package) for package in closure(requirements)}
    return sorted(
        f"{name}: {text or 'no licence stated'}" for name, text in licences.items() if not is_permitted(text, permitted)
    )


def main() -> int:
    """Checks this project; returns the exit code."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    try:
        extras = project["project"]["optional-dependencies"].values()
        ships = complaints([*project["project"]["dependencies"], *chain(*extras)], PERMISSIVE)
        tests = complaints(_group(project, "dev"), PERMISSIVE | FILE_LEVEL)
    except PackageNotFoundError as missing:
        print(f"not installed: {missing.name}; run `make setup`", file=sys.stderr)
        return 2
    for where, lines in (("what ships", ships), ("what tests", tests)):
        for line in lines:
            print(f"licence not permitted in {where}: {line}", file=sys.stderr)
    return 1 if ships or tests else 0


def _group(project: dict[str, dict[str, list[str | dict[str, str]]]], name: str) -> Iterator[str]:
    for entry in project["dependency-groups"][name]:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _group(project, entry["include-group"])


if __name__ == "__main__":
    sys.exit(main())

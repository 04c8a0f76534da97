from collections.abc import Callable
from email.message import Message
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from tools import check_licences
from tools.check_licences import FILE_LEVEL, PERMISSIVE, complaints, is_permitted, licence_of


@pytest.mark.parametrize(
    "expression",
    [
        "MIT",
        "Apache-2.0 AND MIT",
        "GPL-3.0-only OR MIT",
        "(MIT OR GPL-2.0-only) AND BSD-3-Clause",
        "MIT OR (Apache-2.0 AND ISC)",
    ],
)
def test_permissive_licences_may_ship(expression: str) -> None:
    assert is_permitted(expression, PERMISSIVE)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "GPL-3.0-or-later",
        "LGPL-2.1-only",
        "AGPL-3.0-only",
        "MIT AND LGPL-3.0-only",
        "MPL-2.0",
        "MIT AND (MPL-2.0 OR GPL-2.0-only)",
        "GPL-2.0-only WITH Classpath-exception-2.0",
        "Proprietary",
        "(MIT",
        "MIT MIT",
        "MIT OR",
    ],
)
def test_anything_else_may_not(expression: str) -> None:
    assert not is_permitted(expression, PERMISSIVE)


def test_file_level_copyleft_may_test() -> None:
    assert is_permitted("MPL-2.0", PERMISSIVE | FILE_LEVEL)
    assert not is_permitted("LGPL-3.0-only", PERMISSIVE | FILE_LEVEL)


class Package(Distribution):
    def __init__(self, **headers: str | list[str]) -> None:
        self._text = Message()
        for key, value in headers.items():
            for line in [value] if isinstance(value, str) else value:
                self._text.add_header(key.replace("_", "-"), line)

    def read_text(self, filename: str) -> str | None:
        return self._text.as_string() if filename == "METADATA" else None

    def locate_file(self, path: object) -> Path:
        return Path(str(path))


def test_the_expression_stands_above_what_older_fields_say() -> None:
    assert (
        licence_of(
            Package(License_Expression="MIT", License="GPL", Classifier="License :: OSI Approved :: BSD License")
        )
        == "MIT"
    )


def test_all_classifiers_count() -> None:
    both = [
        "License :: OSI Approved :: MIT License",
        "License :: OSI Approved :: GNU General Public License v3 (GPLv3)",
    ]
    assert not is_permitted(licence_of(Package(Classifier=both)), PERMISSIVE)


def test_a_package_without_a_licence_is_named() -> None:
    assert licence_of(Package(Name="mystery")) == ""


def test_copyleft_is_found_however_deep_and_behind_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {
        "app": Package(Name="app", License="MIT", Requires_Dist=["middle[deep]>=1", "absent; sys_platform == 'plan9'"]),
        "middle": Package(Name="middle", License="MIT", Requires_Dist=["app", "bottom; extra == 'deep'"]),
        "plain": Package(Name="plain", License="MIT", Requires_Dist=["leaf"]),
        "leaf": Package(Name="leaf", License="MIT", Requires_Dist=["bottom; extra == 'deep'"]),
        "bottom": Package(Name="bottom", License="LGPL-3.0-only"),
    }
    lookup: Callable[[str], Distribution] = installed.__getitem__
    monkeypatch.setattr(check_licences, "distribution", lookup)

    assert complaints(["app"], PERMISSIVE) == ["bottom: LGPL-3.0-only"]
    assert complaints(["plain"], PERMISSIVE) == []


def test_this_project_complies() -> None:
    assert check_licences.main() == 0

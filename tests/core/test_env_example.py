import json
import re
from pathlib import Path

import pytest
from pydantic import SecretStr

from worker.settings import Settings

LINES = Path(__file__).parents[2].joinpath(".env.example").read_text().splitlines()
SHOWN = {name.lower(): value for name, value in re.findall(r"^# ([A-Z_]+)=(.*)$", "\n".join(LINES), re.MULTILINE)}


def test_every_setting_is_shown_and_no_other() -> None:
    assert SHOWN.keys() == Settings.model_fields.keys()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_default_is_shown(name: str) -> None:
    field = Settings.model_fields[name]
    if field.default_factory is not None and name != "avatar_create_extra":
        assert SHOWN[name] == ""
        return
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    shown = "" if default is None else json.dumps(default) if isinstance(default, dict) else str(default)
    assert SHOWN[name] == shown


def test_nothing_is_switched_on_by_copying_it() -> None:
    assert not [line for line in LINES if line and not line.startswith("#")]

"""Writes the JSON Schemas of every command and event to `schemas/json/`: `python -m schemas.generate`.

A test fails where the files and the models differ.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from schemas.commands import COMMANDS
from schemas.events import EVENT_TYPES

FOLDER = Path(__file__).parent / "json"


def documents() -> dict[str, dict[str, Any]]:
    """File name → JSON Schema (2020-12) of what that command or event looks like on the wire."""
    found: dict[str, dict[str, Any]] = {}
    for name, command in COMMANDS.items():
        schema = command.model_json_schema()
        # On the wire the routing key may stand in for the field.
        schema["required"] = [field for field in schema["required"] if field != "conversationId"]
        found[f"command.{name}.json"] = schema
    for data, event_type in EVENT_TYPES.items():
        schema = TypeAdapter(data).json_schema(mode="serialization")
        schema.pop("additionalProperties")  # Listeners should live with fields that a later version adds.
        schema["properties"] = {"conversationId": {"type": "string"}} | schema["properties"]
        # What has a value by default is always sent.
        sent = [name for name, field in schema["properties"].items() if field.get("default") is not None]
        schema["required"] = ["conversationId", *schema["required"], *sent]
        found[f"event.{event_type}.json"] = schema
    for name, schema in found.items():
        schema["title"] = name.removesuffix(".json")
        for field in schema["properties"].values():
            field.pop("title", None)
            if field.get("default", ...) is None:
                field.pop("default")
    return {
        name: {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema for name, schema in found.items()
    }


def render(schema: dict[str, Any]) -> str:
    """One document as it stands in its file."""
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write all files anew and drop those no model stands behind."""
    FOLDER.mkdir(exist_ok=True)
    wanted = documents()
    for path in FOLDER.glob("*.json"):
        if path.name not in wanted:
            path.unlink()
    for name, schema in wanted.items():
        (FOLDER / name).write_text(render(schema), encoding="utf-8")


if __name__ == "__main__":
    main()

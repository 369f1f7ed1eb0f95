"""JSON schemas of functions, written so that openai-harmony shows all of them to the model.

It shows `any` in the place of references, `anyOf`, and schemas without a type.
"""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

_ROOM = 1 << 18  # characters of definitions that are inlined: references can multiply them
_DEEPEST = 32  # references inside each other
_UNIONS = ("oneOf", "anyOf", "allOf")
_NULL = {"type": ["null"]}  # null alone is shown only in a list of types
_NOTES = ("title", "description", "default")


def shown_schema(schema: Any) -> Any:
    """Return a function's schema in the keywords that openai-harmony shows.

    Local references are inlined, but for recursive ones.
    """
    return _Writer(schema).shown(schema, ())


class _Writer:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._room = _ROOM

    def shown(self, schema: Any, within: tuple[str, ...]) -> Any:
        """Return a schema that stands inside the references `within`."""
        if not isinstance(schema, Mapping):
            return schema
        reference = schema.get("$ref")
        if isinstance(reference, str) and (target := self._target(reference, within)) is not None:
            beside = {key: value for key, value in schema.items() if key != "$ref"}
            return self.shown({**target, **beside}, (*within, reference))
        shown = {k: v for k, v in schema.items() if k not in ("$defs", "definitions")}
        for key in ("items", "additionalProperties"):
            if key in shown:
                shown[key] = self.shown(shown[key], within)
        if isinstance(properties := shown.get("properties"), Mapping):
            shown["properties"] = {k: self.shown(v, within) for k, v in properties.items()}
            shown.setdefault("type", "object")
        if "type" not in shown:
            shown = self._union(shown, within)
        return _nullable(_enumerated(shown))

    def _union(self, schema: dict[str, Any], within: tuple[str, ...]) -> dict[str, Any]:
        """Return a schema without a type whose alternatives, if any, are `oneOf`."""
        key = next((k for k in _UNIONS if isinstance(schema.get(k), list)), None)
        if key is None:
            return schema
        beside = {k: value for k, value in schema.items() if k != key}
        branches = [self.shown(branch, within) for branch in schema[key]]
        types = [branch.get("type") if isinstance(branch, dict) else None for branch in branches]
        others = [b for b, kind in zip(branches, types, strict=True) if kind != "null"]
        null = len(others) < len(branches)
        if len(others) == 1 and isinstance(others[0], dict) and "type" in others[0]:
            return _or_null(others[0], beside) if null else {**others[0], **beside}
        if key == "allOf":
            return {**beside, key: branches}
        return {**beside, "oneOf": [*others, _NULL] if null else others}

    def _target(self, reference: str, within: tuple[str, ...]) -> Mapping[str, Any] | None:
        """Return the definition of a local reference; None for one that has to stay."""
        if reference in within or len(within) >= _DEEPEST or self._room < 0:
            return None
        if not reference.startswith("#/"):
            return None
        target = self._root
        for step in unquote(reference[2:]).split("/"):
            name = step.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            return None
        self._room -= len(json.dumps(target))
        return target


def _enumerated(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose list of values has a type, and no null among them."""
    if not isinstance(values := schema.get("enum"), list):
        return schema
    others = [value for value in values if value is not None]
    if others and len(others) < len(values):
        schema = {**schema, "enum": others, "nullable": True}
    if others and "type" not in schema:
        if all(isinstance(value, str) for value in others):
            return {**schema, "type": "string"}
        if all(type(value) in (int, float) for value in others):
            return {**schema, "type": "number"}
    return schema


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose list of types, if it is one type and null, keeps its details shown."""
    kinds = schema.get("type")
    if not isinstance(kinds, list) or len(kinds) != 2 or "null" not in kinds:
        return schema
    kind = kinds[1] if kinds[0] == "null" else kinds[0]
    notes = {key: schema[key] for key in _NOTES if key in schema}
    bare = {key: value for key, value in schema.items() if key not in _NOTES}
    return _or_null({**bare, "type": kind}, notes)


def _or_null(schema: dict[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that accepts null, too.

    openai-harmony forgets `nullable` where a null inside an object or array is shown.
    """
    if schema["type"] in ("object", "array"):
        return {**notes, "oneOf": [schema, _NULL]}
    return {**schema, "nullable": True, **notes}

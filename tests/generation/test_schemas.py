"""Schemas of functions as gpt-oss reads them."""

import json

import pytest

from quantkit.generation.prompts import HarmonyPrompts, Wishes, open_prompts
from quantkit.generation.schemas import shown_schema
from tests.support import standin

EDIT = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "line": {"type": ["integer", "null"]}},
    "required": ["path"],
}
DEFINED = {"$defs": {"Edit": EDIT}}


@pytest.fixture(scope="module")
def prompts():
    if not standin.PUBLISHED.is_dir():
        pytest.skip(f"NOT TESTED with the published tokenizer: no {standin.PUBLISHED}")
    harmony = open_prompts(None, standin.PUBLISHED)
    assert isinstance(harmony, HarmonyPrompts)
    return harmony


@pytest.fixture(scope="module")
def rendered(prompts):
    """The parameters of a function as the prompt says them, in one line."""

    def render(properties):
        parameters = {"type": "object", "properties": properties, **DEFINED}
        wishes = Wishes([{"name": "f", "description": "F.", "parameters": parameters}])
        prompt = prompts.prompt([{"role": "user", "content": "x"}], wishes)
        text = prompts._encoding.decode(prompt.tokens)
        return " ".join(text.partition("type f = (_: {")[2].partition("}) => any;")[0].split())

    return render


def test_schemas_of_pydantic_models_are_shown_whole(rendered):
    properties = {
        "edits": {"type": "array", "items": {"$ref": "#/$defs/Edit"}},
        "lang": {"anyOf": [{"type": "string", "enum": ["py", "js"]}, {"type": "null"}]},
    }
    assert rendered(properties) == (
        'edits?: { path: string, line?: number | null, }[], lang?: "py" | "js" | null,'
    )


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"$ref": "#/$defs/Edit"}, "{ path: string, line?: number | null, }"),
        (
            {"anyOf": [{"$ref": "#/$defs/Edit"}, {"type": "null"}]},
            "| { path: string, line?: number | null, } | null",
        ),
        ({"allOf": [{"type": "string"}]}, "string"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "| number | string"),
        (
            {"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
            "| number | string | null",
        ),
        ({"type": ["array", "null"], "items": {"type": "string"}}, "| string[] | null"),
        ({"properties": {"x": {"type": "string"}}}, "{ x?: string, }"),
        ({"enum": ["a", "b"]}, '"a" | "b"'),
        ({"enum": ["a", None]}, '"a" | null'),
        ({"enum": [1, 2.5]}, "number"),
        ({"$ref": "#/$defs/Missing"}, "any"),
        ({"$ref": "https://example.com/schema"}, "any"),
    ],
)
def test_types(rendered, schema, text):
    assert rendered({"x": schema}).removesuffix(",").rstrip() == f"x?: {text}"


def test_properties_may_be_named_as_keywords():
    properties = {"properties": {"type": "string"}, "$ref": {"type": "string"}}
    schema = {"type": "object", "properties": {**properties, "definitions": {"type": "string"}}}
    assert shown_schema(schema) == schema


def test_a_recursive_reference_stays():
    node = {"type": "object", "properties": {"next": {"$ref": "#/definitions/Node"}}}
    schema = {"$ref": "#/definitions/Node", "definitions": {"Node": node}}
    assert shown_schema(schema) == node


def test_conditions_beside_a_type_are_no_union():
    schema = {"type": "object", "properties": {}, "anyOf": [{"required": ["a"]}]}
    assert shown_schema(schema) == schema


def test_references_cannot_multiply_without_end():
    twice = [{"$ref": f"#/$defs/{number + 1}"} for number in range(30)]
    defined = {str(n): {"properties": {"a": ref, "b": ref}} for n, ref in enumerate(twice)}
    schema = {"$ref": "#/$defs/0", "$defs": {**defined, "30": {"type": "string"}}}
    assert len(json.dumps(shown_schema(schema))) < 1 << 20

"""Tool declarations: golden texts byte for byte, the quirks one by one, and what is refused."""

import copy
import datetime
import functools
import json
import logging
import random
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from kimi.kimi_tools import (
    UnsupportedSchema,
    deep_sort_dict,
    encode_tools_to_typescript_style,
    normalize_tools,
    render_tool_declaration,
)

GOLDEN = json.loads((DATA / "tool_declaration_golden.json").read_bytes())
CHATS = json.loads((DATA / "chat_golden.json").read_bytes())
DECLARE, END = "<|im_system|>tool_declare<|im_middle|>", "<|im_end|>"


def tool(parameters, name="f", **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def field(schema, **root):
    """What stands behind `a` when it is the one optional field of a function."""
    parameters = {"type": "object", "properties": {"a": schema}, **root}
    text = encode_tools_to_typescript_style([tool(parameters)])
    return text.partition("(_: {\n")[2].removesuffix("\n}) => any;\n}\n")


def function(parameters, **more):
    """The lines of one function, without the frame."""
    text = encode_tools_to_typescript_style([tool(parameters, **more)])
    return text.removeprefix("# Tools\n\n## functions\nnamespace functions {\n").removesuffix("\n}\n")


# Golden texts


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_declaration(case):
    before = copy.deepcopy(case["tools"])
    expected = case["declaration"] if case["declaration"] is not None else case["json_fallback"]
    assert render_tool_declaration(normalize_tools(case["tools"])) == expected
    if case["declaration"] is None:
        with pytest.raises(UnsupportedSchema, match=r"^tool 'f', parameters\.properties\."):
            encode_tools_to_typescript_style(case["tools"])
    else:
        assert encode_tools_to_typescript_style(case["tools"]) == expected
    assert case["tools"] == before


@pytest.mark.parametrize("chat", [c for c in CHATS if c.get("tools")], ids=lambda chat: chat["name"])
def test_golden_prompts_declare_their_tools(chat):
    declaration = render_tool_declaration(normalize_tools(chat["tools"]))
    assert chat["rendered"].startswith(DECLARE + declaration + END)


# Quirks by hand


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (True, "  a?: any"),
        ({}, "  a?: any"),
        ({"type": "uuid"}, "  a?: uuid"),
        ({"enum": ['say "hi"', "a\nb", True, None, 1.0]}, '  a?: "say "hi"" | "a\nb" | True | None | 1.0'),
        ({"enum": [True, 2], "type": "integer"}, "  a?: True | 2"),
        ({"enum": [None], "type": "object"}, "  a?: None"),
        ({"enum": ["x"], "type": ["null", "string"]}, '  a?: "x"'),
        ({"enum": ["x"], "anyOf": [{"type": "null"}]}, "  a?: null"),
        ({"type": "string", "oneOf": [1], "const": 2, "nullable": True}, "  a?: string"),
        (
            {"type": "string", "minLength": 1, "maximum": 3, "format": "date"},
            "  // minLength: 1\n  a?: string",
        ),
        ({"type": "string", "enum": ["x"], "minLength": 1}, '  a?: "x"'),
        ({"type": "string", "description": "one\n\n  two\r\n"}, "  // one\n\n  //   two\r\n\n  a?: string"),
        ({"type": "number", "default": True}, "  // Default: True\n  a?: number"),
        ({"type": "object", "default": {"b": 1, "a": "é"}}, '  // Default: {"a": "é", "b": 1}\n  a?: {}'),
        ({"type": "array", "items": False}, "  a?: Array<any>"),
        ({"type": "array", "items": {"type": "string", "default": "x"}}, "  a?: Array<string>"),
        (
            {"type": "array", "items": {"type": "array", "description": "row", "items": {"type": "integer"}}},
            "  a?: Array<\n    // row\n    Array<number>\n  >",
        ),
        (
            {
                "type": "object",
                "additionalProperties": {"type": "string", "minLength": 1},
                "properties": {"k": {}},
            },
            "  a?: {\n    k?: any,\n    [k: string]: string\n  }",
        ),
    ],
)
def test_field(schema, expected):
    assert field(schema) == expected


def test_required_fields_come_first_but_are_read_in_the_order_of_their_names():
    # `z` is written first and read last, when the definition that stands inside `a` is known.
    parameters = {
        "properties": {
            "z": {"$ref": "#/$defs/N"},
            "a": {"type": "object", "$defs": {"N": {"type": "integer"}}},
        },
        "required": ["z", "no such field"],
    }
    assert function(parameters) == "interface N number\ntype f = (_: {\n  z: N,\n  a?: {}\n}) => any;"
    parameters["properties"] = {"b": {"$ref": "#/$defs/N"}, "c": parameters["properties"]["a"]}
    with pytest.raises(UnsupportedSchema, match=r"tool 'f', parameters\.properties\.b .*'#/\$defs/N'"):
        function(parameters)


def test_self_reference_of_the_root_and_of_a_definition():
    tree = {"properties": {"b": {"type": "string"}, "a": {"$ref": "#"}}, "required": ["b"]}
    interface = "interface parameters {\n  a?: parameters,\n  b: string\n}\n"
    assert function(tree) == interface + "type f = (_: parameters) => any;"
    # Only a `#` that the root reads itself makes that interface.
    hidden = {"properties": {"n": {"$ref": "#/$defs/N"}}, "$defs": {"N": {"anyOf": [{"$ref": "#"}]}}}
    assert function(hidden) == "interface N parameters\ntype f = (_: {\n  n?: N\n}) => any;"
    loop = {"properties": {"n": {"$ref": "#/$defs/N"}}, "$defs": {"N": {"$ref": "#/$defs/N"}}}
    assert function(loop) == "interface N N\ntype f = (_: {\n  n?: N\n}) => any;"


def test_definitions_of_definitions_are_written_too_and_later_ones_win():
    inner = {"type": "object", "$defs": {"B": {"type": "string"}}, "properties": {"b": {"$ref": "#/$defs/B"}}}
    parameters = {"$defs": {"A": inner}, "properties": {"a": {"$ref": "#/$defs/A"}}}
    assert function(parameters).startswith("interface A {\n  b?: B\n}\ninterface B string\ntype f")
    parameters = {
        "$defs": {"B": {"type": "null"}},
        "properties": {"a": inner, "b": {"$ref": "#/$defs/B"}},
    }
    assert function(parameters).startswith("interface B string\ntype f")


def test_frame():
    assert encode_tools_to_typescript_style([]) == ""
    assert encode_tools_to_typescript_style([{"type": "builtin"}, {"type": "function", "function": {}}]) == ""
    assert function({}) == "type f = (_: {}) => any;"
    assert function({"type": "array", "description": "not shown"}) == "type f = (_: {}) => any;"
    unnamed = encode_tools_to_typescript_style([{"type": "function", "function": {"description": "d"}}])
    assert "\n// d\ntype function = (_: {}) => any;\n" in unnamed
    assert render_tool_declaration(None) == render_tool_declaration([]) == ""


# What has no TypeScript form


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        (None, r"a is a NoneType"),
        ("string", r"a is a str"),
        ({"type": None}, r"a has no type, only type"),
        ({"type": 3}, r"a has no type"),
        ({"type": ["string", ["null"]]}, r"a has type .*\['null'\] is unknown"),
        ({"type": ["string"], "enum": ["x"]}, r"a has enum value 'x'.*\['string'\]"),
        ({"type": "boolean", "enum": [1]}, r"a has enum value 1"),
        ({"type": {"x": 1}, "enum": [1]}, r"a has enum value 1"),
        ({"enum": "xy"}, r"a\.enum is a str"),
        ({"anyOf": {"type": "string"}}, r"a\.anyOf is a dict"),
        ({"anyOf": [{}, {"oneOf": []}]}, r"a\.anyOf\[1\] has no type, only oneOf"),
        ({"$ref": ["#"]}, r"a has \$ref \['#'\]"),
        ({"$ref": "other.json"}, r"a has \$ref 'other\.json'"),
        ({"type": "object", "properties": []}, r"a\.properties is a list"),
        ({"type": "object", "properties": ["x"]}, r"a\.properties is a list"),
        ({"type": "object", "required": "x"}, r"a\.required is a str"),
        ({"type": "object", "$defs": 1}, r"a\.\$defs is a int"),
        ({"type": "object", "additionalProperties": "no"}, r"a\.additionalProperties is a str"),
        ({"type": "array", "items": {"allOf": []}}, r"a\.items has no type, only allOf"),
        ({"type": "string", "description": ["x"]}, r"a has a description that is a list"),
    ],
)
def test_error_names_tool_and_place(schema, where):
    with pytest.raises(UnsupportedSchema, match=rf"^tool 'f', parameters\.properties\.{where}"):
        field(schema)


def test_very_deep_schema_is_refused_not_a_crash():
    schema = {"type": "string"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(UnsupportedSchema, match="nested too deeply"):
        encode_tools_to_typescript_style([tool({"properties": {"a": schema}})])
    with pytest.raises(ValueError, match=r"^tools\[1\] is nested too deeply"):
        normalize_tools([tool({}), tool({"properties": {"a": schema}})])


def test_each_reason_for_json_is_logged_once(caplog):
    name = f"once_{random.random()}"  # the logger remembers for the whole process
    tools = normalize_tools([tool({}), tool({"properties": {"a": {"oneOf": []}}}, name=name)])
    with caplog.at_level(logging.WARNING):
        first = render_tool_declaration(tools)
        assert first == render_tool_declaration(tools) == json.dumps(tools, separators=(",", ":"))
    assert [r.message for r in caplog.records] == [
        f"The tools are declared as JSON instead of TypeScript: tool {name!r}, parameters.properties.a has no type, only oneOf"
    ]


def test_what_is_left_out_or_changed_is_logged(caplog):
    kind = f"kind_{random.random()}"
    with caplog.at_level(logging.WARNING):
        render_tool_declaration(
            normalize_tools([tool({"properties": {"a": False}}, name=kind), {"type": kind}])
        )
    assert len(caplog.records) == 2
    assert f"tool {kind!r}, parameters.properties.a" in caplog.records[0].message
    assert f"tools[1] is not declared: type {kind!r}" in caplog.records[1].message


# What users pass


def weather(city: str, unit: Literal["c", "f"] = "c"):
    """
    Weather of today.

    Args:
        city: Where?
        unit: Which scale?
    """


class Weather:
    """Weather of today.

    As pydantic offers it.
    """

    @classmethod
    def model_json_schema(cls):
        return {
            "title": "Weather",
            "description": "Weather of today.",
            "type": "object",
            "properties": {"city": {"type": "string"}},
        }


class Forecast(Weather):
    pass


class Dumped:
    def __init__(self, value):
        self.value = value

    def model_dump(self):
        return self.value


def test_functions_models_and_bare_dicts():
    assert (
        encode_tools_to_typescript_style(normalize_tools([weather]))
        == """# Tools

## functions
namespace functions {
// Weather of today.
type weather = (_: {
  // Where?
  city: string,
  // Which scale?
  unit?: "c" | "f"
}) => any;
}
"""
    )
    parameters = {"properties": {"city": {"type": "string"}}, "type": "object"}
    model, heir = normalize_tools([Weather, Forecast])
    description = "Weather of today.\n\nAs pydantic offers it."
    assert model == tool(parameters, name="Weather", description=description)
    assert heir == tool(parameters, name="Forecast")
    bare = {"name": "f", "parameters": parameters}
    expected = [tool(parameters)]
    for spelling in (
        bare,
        {"type": "function", **bare},
        tool(parameters),
        Dumped(bare),
        Dumped(tool(parameters)),
    ):
        assert normalize_tools([spelling]) == normalize_tools((spelling,)) == expected


def test_pydantic_model():
    pydantic = pytest.importorskip("pydantic")

    class Query(pydantic.BaseModel):
        """Search."""

        text: str = pydantic.Field(description="What?", min_length=1)
        limit: int | None = None

    tools = normalize_tools([Query])
    assert tools[0]["function"].keys() == {"description", "name", "parameters"}
    assert tools[0]["function"]["parameters"].keys() == {"properties", "required", "type"}
    expected = "// Search.\ntype Query = (_: {\n  // What?\n  // minLength: 1\n  text: string,\n  limit?: number | null\n}) => any;"
    assert expected in encode_tools_to_typescript_style(tools)


def test_nothing_is_none_and_other_types_stay():
    assert normalize_tools(None) is normalize_tools([]) is normalize_tools(()) is None
    plugin = {"type": "_plugin", "name": "web"}
    assert normalize_tools([plugin]) == [plugin]
    assert normalize_tools([{"type": "function", "function": {}}]) == [{"type": "function", "function": {}}]


@pytest.mark.parametrize(
    ("tools", "sentence"),
    [
        ("tools", r"^tools must be a list of tools, not str"),
        ({"type": "function"}, r"^tools must be a list of tools, not dict"),
        (weather, r"^tools must be a list of tools, not function"),
        (["weather"], r"^tools\[0\] must be a dict, a function or a pydantic model, not str"),
        ([tool({}), None], r"^tools\[1\] must be .* not NoneType"),
        ([Dumped([1])], r"^tools\[0\]\.model_dump\(\) must return a dict, not list"),
        ([functools.partial(weather)], r"^tools\[0\] is a function that lacks type hints or a docstring"),
        ([lambda x: x], r"^tools\[0\] is a function that lacks type hints or a docstring"),
        ([{"type": "function", "function": "f"}], r"^tools\[0\]\.function must be a dict, not str"),
        (
            [{"type": "function", "function": {"description": "d"}}],
            r"^tools\[0\]\.function\.name must .* not None",
        ),
        ([tool({}, name="")], r"^tools\[0\]\.function\.name must be a non-empty string, not ''"),
        ([{"name": 3}], r"^tools\[0\]\.function\.name must be a non-empty string, not 3"),
        ([tool({}, description=["d"])], r"^tools\[0\]\.function\.description must be a string, not list"),
        ([tool("{}")], r"^tools\[0\]\.function\.parameters must be a dict \(a JSON schema\), not str"),
        ([tool([])], r"^tools\[0\]\.function\.parameters must be a dict"),
        ([tool({1: 2, "a": 3})], r"^tools\[0\] cannot be written as JSON: .*"),
        ([tool({"default": datetime.date(2026, 1, 1)})], r"^tools\[0\] cannot be written as JSON: .* date"),
    ],
)
def test_bad_tools_are_refused(tools, sentence):
    with pytest.raises(ValueError, match=sentence):
        normalize_tools(tools)


def test_a_tool_that_contains_itself_is_refused():
    schema = {"type": "object"}
    schema["properties"] = {"me": schema}
    with pytest.raises(ValueError, match=r"^tools\[0\] is nested too deeply, or contains itself"):
        normalize_tools([tool(schema)])


def test_deep_sort_dict_sorts_by_code_point_and_copies():
    value = {"b": [{"z": 1, "a": (2, {"d": 3, "c": 4})}], "B": None, "é": 0, "a": ""}
    before = copy.deepcopy(value)
    sorted_value = deep_sort_dict(value)
    assert json.dumps(sorted_value, ensure_ascii=False) == (
        '{"B": null, "a": "", "b": [{"a": [2, {"c": 4, "d": 3}], "z": 1}], "é": 0}'
    )
    assert value == before
    assert sorted_value["b"] is not value["b"]


# Properties


WORDS = st.sampled_from(
    ["a", "b", "N", "type", "$defs", "#", "#/$defs/N", "string", "null", 'it\'s "é"\n', ""]
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(allow_nan=False), WORDS)
KEYS = st.sampled_from(
    [
        "$ref",
        "$defs",
        "anyOf",
        "oneOf",
        "enum",
        "type",
        "items",
        "properties",
        "required",
        "additionalProperties",
        "description",
        "default",
        "minLength",
        "maximum",
        "pattern",
        "a",
        "N",
    ]
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
TYPES = st.sampled_from(
    ["string", "number", "integer", "boolean", "null", "object", "array", ["string", "null"]]
)


def with_fields(inner):
    """Schemas that mostly have a form, so that the writing is tried too and not only the refusing."""
    names = st.sampled_from(["a", "b", "N"])
    return st.fixed_dictionaries(
        {"type": TYPES},
        optional={
            "properties": st.dictionaries(names, inner, max_size=3),
            "$defs": st.dictionaries(names, inner, max_size=2),
            "required": st.lists(names, max_size=2),
            "items": inner,
            "additionalProperties": st.booleans() | inner,
            "anyOf": st.lists(inner, max_size=2),
            "description": st.sampled_from(["", "d", "d\n\ne\n"]),
            "default": SCALARS,
        },
    )


LEAVES = st.one_of(
    st.fixed_dictionaries({"type": TYPES}),
    st.fixed_dictionaries({"$ref": st.sampled_from(["#", "#/$defs/N", "#/$defs/a"])}),
    st.booleans(),
)
SCHEMAS = st.recursive(LEAVES, with_fields, max_leaves=10)


def encode_or_reason(tools):
    try:
        return encode_tools_to_typescript_style(tools)
    except UnsupportedSchema as error:
        assert str(error).startswith("tool ")
        return None


def shuffled(value, rng):
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {key: shuffled(value[key], rng) for key in keys}
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


@settings(max_examples=200, deadline=None)
@given(st.one_of(JSON, SCHEMAS), st.randoms(use_true_random=False))
def test_any_schema_is_written_or_refused_alike_in_every_key_order(schema, rng):
    tools = [tool(schema)]
    before = copy.deepcopy(tools)
    text = encode_or_reason(tools)
    assert tools == before
    assert encode_or_reason(shuffled(tools, rng)) == text
    assert text is None or (
        text.startswith("# Tools\n\n## functions\nnamespace functions {\n") and text.endswith("\n}\n")
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(JSON, max_size=2))
def test_whatever_can_be_normalized_can_be_declared(tools):
    before = copy.deepcopy(tools)
    try:
        normalized = normalize_tools(tools)
    except ValueError as error:
        assert str(error).startswith("tools[")
    else:
        assert isinstance(render_tool_declaration(normalized), str)
        assert normalize_tools(normalized) == normalized
    assert tools == before

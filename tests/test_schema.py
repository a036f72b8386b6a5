"""Calls against schemas: each keyword by hand, and what no rule understands is named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi.kimi_schema import validate_tool_call

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "book",
            "description": "Book a trip.",
            "parameters": {
                "type": "object",
                "required": ["city", "days"],
                "additionalProperties": False,
                "properties": {
                    "city": {"type": "string", "pattern": "^[A-Z]", "minLength": 2, "format": "city"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14},
                    "class": {"enum": ["eco", "first", 1, None]},
                    "stops": {
                        "type": "array",
                        "items": {"$ref": "#/$defs/stop"},
                        "maxItems": 3,
                        "uniqueItems": True,
                    },
                    "budget": {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]},
                },
                "$defs": {"stop": {"type": "object", "properties": {"name": {"type": ["string", "null"]}}}},
            },
        },
    },
    {"type": "function", "function": {"name": "ping"}},
    {"type": "_plugin"},
]


def call(arguments, name):
    return {
        "id": f"functions.{name}:0",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def check_call(arguments, name="book"):
    return validate_tool_call(call(arguments, name), TOOLS)


@pytest.mark.parametrize(
    ("arguments", "errors"),
    [
        ('{"city": "Bern", "days": 2}', []),
        ('{"city": "Bern", "days": 2.0, "class": 1.0, "budget": null, "stops": [{"name": null}, {}]}', []),
        ('{"city": "Bern"}', ["arguments.days is missing"]),
        ('{"city": "Bern", "days": "2"}', ['arguments.days must be of type integer, not "2"']),
        ('{"city": "Bern", "days": true}', ["arguments.days must be of type integer, not true"]),
        ('{"city": "Bern", "days": 2.5}', ["arguments.days must be of type integer, not 2.5"]),
        ('{"city": "Bern", "days": 15}', ["arguments.days must be at most 14"]),
        (
            '{"city": "b", "days": 0}',
            [
                "arguments.city must match '^[A-Z]'",
                "arguments.city must have 2 characters or more",
                "arguments.days must be at least 1",
            ],
        ),
        ('{"city": "Bern", "days": 2, "hotel": 1}', ["arguments.hotel is not allowed"]),
        (
            '{"city": "Bern", "days": 2, "class": true}',
            ['arguments.class must be one of ["eco", "first", 1, null], not true'],
        ),
        (
            '{"city": "Bern", "days": 2, "stops": [{"name": "a"}, {"name": 1}]}',
            ["arguments.stops[1].name must be of type string or null, not 1"],
        ),
        (
            '{"city": "Bern", "days": 2, "stops": [{"name": "a"}, {"name": "a"}]}',
            ["arguments.stops must not repeat an item"],
        ),
        (
            '{"city": "Bern", "days": 2, "budget": 0}',
            [
                "arguments.budget fits none of the 2 schemas of anyOf (arguments.budget must be more than 0; "
                "arguments.budget must be of type null, not 0)"
            ],
        ),
        ("[]", ["arguments must be of type object, not []"]),
    ],
)
def test_arguments_against_their_schema(arguments, errors):
    check = check_call(arguments)
    assert sorted(check.errors) == sorted(errors)
    assert check.unchecked == []
    assert check.ok is (not errors)


@pytest.mark.parametrize(
    "arguments", ['{"city": "Be', "{'city': 1}", "NaN", "[" * 100_000, "1" * 5000, "{} {}"]
)
def test_arguments_that_are_no_json(arguments):
    (error,) = check_call(arguments).errors
    assert error.startswith(("arguments of book are not JSON: ", "arguments of book are nested too deeply"))


def test_names_and_tools_without_parameters():
    assert check_call("{}", "cook").errors == ["there is no tool 'cook', only book, ping"]
    assert check_call('{"any": 1}', "ping").ok
    assert validate_tool_call(call("{}", "ping"), None).errors == [
        "there is no tool 'ping', only none at all"
    ]
    assert validate_tool_call(
        {"function": {"name": "book", "arguments": {"city": "Bern", "days": 1}}}, TOOLS
    ).ok


def verdict(value, schema):
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    return validate_tool_call({"function": {"name": "f", "arguments": json.dumps(value)}}, tools)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"const": 1}, [1, 1.0], [True, "1", None]),
        ({"enum": [[0], {"a": False}]}, [[0], [0.0], {"a": False}], [[False], {"a": 0}]),
        ({"maximum": 1}, [1, "x", True, None], [1.5]),
        ({"exclusiveMaximum": 1}, [0], [1]),
        ({"multipleOf": 0.1}, [0.3, 0, 7], [0.35]),
        ({"multipleOf": 3}, [9, 9.0, 10**30 * 3], [10, 10**30]),
        ({"maxLength": 2}, ["🧑", [1, 2, 3]], ["abc"]),
        ({"minItems": 1}, [[0], ""], [[]]),
        ({"uniqueItems": True}, [[1, True, "1"]], [[1, 1.0], [{"a": 1, "b": 2}, {"b": 2, "a": 1}]]),
        ({"uniqueItems": False}, [[1, 1]], []),
        ({"minProperties": 1, "maxProperties": 1}, [{"a": 1}], [{}, {"a": 1, "b": 2}]),
        (
            {"prefixItems": [{"type": "null"}], "items": {"type": "string"}},
            [[], [None, "a"]],
            [[None, 1], ["a"]],
        ),
        ({"items": [{"type": "null"}]}, [[None, 5]], [[5]]),
        ({"items": False}, [[]], [[1]]),
        (
            {"patternProperties": {"^x": {"type": "null"}}, "additionalProperties": False},
            [{"xa": None}],
            [{"a": 1}, {"x": 1}],
        ),
        (
            {"properties": {"a": {}}, "additionalProperties": {"type": "null"}},
            [{"a": 1, "b": None}],
            [{"b": 1}],
        ),
        ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, [1, 2], [0, 3]),
        ({"oneOf": [{"minimum": 1}, {"maximum": 2}]}, [0, 3], [1]),
        ({"not": {"type": "null"}}, [1], [None]),
        ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"type": "null"}}}, [None], [1]),
        ({"$ref": "#/prefixItems/0", "prefixItems": [{"type": "array"}]}, [[[]]], [1]),
        (
            {"properties": {"next": {"$ref": "#"}}, "required": ["v"]},
            [{"v": 1, "next": {"v": 2}}],
            [{"v": 1, "next": {}}],
        ),
        (True, [1], []),
    ],
)
def test_keyword(schema, good, bad):
    for value in good:
        assert verdict(value, schema) == ([], []), value
    for value in bad:
        check = verdict(value, schema)
        assert check.errors, value
        assert not check.unchecked


@pytest.mark.parametrize(
    ("schema", "unchecked"),
    [
        ({"contains": {"type": "null"}}, "arguments: contains {'type': 'null'}"),
        ({"minLenght": 3}, "arguments: minLenght 3"),
        ({"properties": {"a": {"if": True}}}, "arguments.a: if True"),
        ({"minProperties": "1"}, "arguments: minProperties '1'"),
        ({"patternProperties": {"(": {}}}, "arguments: patternProperties {'(': {}}"),
        ({"type": "any"}, "arguments: type 'any'"),
        ({"type": [["null"]]}, "arguments: type [['null']]"),
        ({"required": "a"}, "arguments: required 'a'"),
        ({"$ref": "#/$defs/gone"}, "arguments: $ref '#/$defs/gone'"),
        ({"$ref": "https://example.org/s.json"}, "arguments: $ref 'https://example.org/s.json'"),
        ({"$ref": "#"}, "arguments: $ref '#'"),
        ({"properties": {"a": 3}}, "arguments.a: the schema 3"),
    ],
)
def test_what_cannot_be_checked_is_said(schema, unchecked):
    assert verdict({"a": 1}, schema) == ([], [unchecked])


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 2), st.floats(), st.sampled_from(["a", "#", "string", "("])
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "a",
                    "type",
                    "enum",
                    "items",
                    "properties",
                    "required",
                    "$ref",
                    "anyOf",
                    "multipleOf",
                    "pattern",
                    "minItems",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(JSON, JSON)
def test_no_schema_and_no_value_make_the_check_raise(value, schema):
    check = verdict(value, schema)
    assert all(isinstance(text, str) for text in (*check.errors, *check.unchecked))

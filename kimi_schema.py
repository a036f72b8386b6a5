"""Tool calls against the JSON schemas of their tools: is the tool known, are the arguments JSON, does the schema allow them?

These are the questions by which deployments of the model are compared. The answer must not depend on what else is
installed, so the checker is here: the part of JSON Schema 2020-12 that tools use. Keywords that it does not know are
reported.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote


class CallCheck(NamedTuple):
    """`errors` holds a sentence for each thing that is wrong with the call. `unchecked` says which parts of the schema no
    rule here understands: they are about what the tool declares, and the call may or may not satisfy them."""

    errors: list[str]
    unchecked: list[str]

    @property
    def ok(self) -> bool:
        return not self.errors


def validate_tool_call(call: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None) -> CallCheck:
    """Is the tool known, are the arguments JSON, and does its JSON schema allow them?

    `call` is an entry of `tool_calls`, its arguments text or already an object; `tools` are dicts as `normalize_tools`
    returns them.
    """
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    functions = [tool["function"] for tool in tools or () if tool.get("function")]
    known = {function.get("name"): function.get("parameters") or {} for function in functions}
    if name not in known:
        return CallCheck(
            [f"there is no tool {name!r}, only {', '.join(map(str, known)) or 'none at all'}"], []
        )
    check = SchemaCheck(known[name])
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments, parse_constant=refuse_constant)
        errors = check.errors_of(arguments, known[name], "arguments")
    except ValueError as error:
        errors = [f"arguments of {name} are not JSON: {error}"]
    except RecursionError:
        errors = [f"arguments of {name} are nested too deeply"]
    return CallCheck(errors, list(check.unchecked))


def refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


JSON_KINDS: dict[str, Any] = {
    "string": str,
    "number": (int, float),
    "integer": (int, float),
    "boolean": bool,
    "null": type(None),
    "object": dict,
    "array": list,
}
# Keywords about the schema itself, not about values. `format` is a note in JSON Schema unless asked otherwise.
# fmt: off
ANNOTATIONS = {
    "$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType", "default", "definitions",
    "deprecated", "description", "example", "examples", "format", "readOnly", "title", "writeOnly",
}
# fmt: on


TAKE_LISTS = {"enum", "required", "prefixItems", "allOf", "anyOf", "oneOf"}


class Rule(NamedTuple):
    """A keyword that compares a value of some type with a limit; values of other types pass."""

    kind: str
    holds: Callable[[Any, Any], Any]
    sentence: str


RULES = {
    "minimum": Rule("number", operator.ge, "must be at least {}"),
    "maximum": Rule("number", operator.le, "must be at most {}"),
    "exclusiveMinimum": Rule("number", operator.gt, "must be more than {}"),
    "exclusiveMaximum": Rule("number", operator.lt, "must be less than {}"),
    "multipleOf": Rule("number", lambda value, step: is_multiple(value, step), "must be a multiple of {}"),
    "minLength": Rule("string", lambda value, limit: len(value) >= limit, "must have {} characters or more"),
    "maxLength": Rule("string", lambda value, limit: len(value) <= limit, "must have {} characters or fewer"),
    "pattern": Rule("string", lambda value, pattern: re.search(pattern, value), "must match {!r}"),
    "minItems": Rule("array", lambda value, limit: len(value) >= limit, "must have {} items or more"),
    "maxItems": Rule("array", lambda value, limit: len(value) <= limit, "must have {} items or fewer"),
    "uniqueItems": Rule("array", lambda value, on: not on or is_unique(value), "must not repeat an item"),
    "minProperties": Rule("object", lambda value, limit: len(value) >= limit, "must have {} fields or more"),
    "maxProperties": Rule("object", lambda value, limit: len(value) <= limit, "must have {} fields or fewer"),
}


class SchemaCheck:
    """A JSON value against a JSON schema (2020-12, the part of it that tools use), without another package: the answer
    must not depend on what is installed. A keyword it does not know is recorded in `unchecked`, never ignored."""

    def __init__(self, root: Any):
        self.root = root
        self.unchecked: dict[str, None] = {}  # in order, each once
        self._open_references: set[tuple[str, str]] = set()

    def errors_of(self, value: Any, schema: Any, where: str) -> list[str]:
        if isinstance(schema, bool):
            return [] if schema else [f"{where} is not allowed"]
        if not isinstance(schema, dict):
            return self._skip(where, "the schema", schema)
        errors: list[str] = []
        for keyword, given in schema.items():
            try:
                errors += self._check(keyword, given, value, schema, where)
            except (TypeError, ValueError, AttributeError, ArithmeticError, re.error):
                self._skip(where, keyword, given)  # not what the keyword takes, such as "minimum": "1"
        return errors

    def _skip(self, where: str, keyword: str, given: Any) -> list[str]:
        self.unchecked[f"{where}: {keyword} {given!r}"] = None
        return []

    def _check(self, keyword: str, given: Any, value: Any, schema: dict[str, Any], where: str) -> list[str]:
        if keyword in TAKE_LISTS and not isinstance(given, list):
            return self._skip(where, keyword, given)
        if rule := RULES.get(keyword):
            holds = not is_kind(value, rule.kind) or rule.holds(value, given)
            return [] if holds else [f"{where} {rule.sentence.format(given)}"]
        if keyword == "type":
            kinds = given if isinstance(given, list) else [given]
            if not all(kind in JSON_KINDS for kind in kinds):
                return self._skip(where, keyword, given)
            fits = any(is_kind(value, kind) for kind in kinds)
            return [] if fits else [f"{where} must be of type {' or '.join(kinds)}, not {shorten(value)}"]
        if keyword in ("enum", "const"):
            allowed = given if keyword == "enum" else [given]
            fits = canonical(value) in map(canonical, allowed)
            return [] if fits else [f"{where} must be one of {shorten(allowed)}, not {shorten(value)}"]
        if keyword in ("properties", "patternProperties", "additionalProperties", "required"):
            return self._check_fields(keyword, given, value, schema, where) if isinstance(value, dict) else []
        if keyword in ("items", "prefixItems"):
            return self._check_items(keyword, given, value, schema, where) if isinstance(value, list) else []
        if keyword in ("allOf", "anyOf", "oneOf", "not"):
            return self._check_combination(keyword, given, value, where)
        if keyword == "$ref":
            return self._check_reference(given, value, where)
        return [] if keyword in ANNOTATIONS else self._skip(where, keyword, given)

    def _check_fields(self, keyword: str, given: Any, value: Any, schema: Any, where: str) -> list[str]:
        if keyword == "required":
            return [f"{where}.{name} is missing" for name in given if name not in value]
        patterns, listed = schema.get("patternProperties", {}), schema.get("properties", {})
        errors = []
        for name, item in value.items():
            place = f"{where}.{name}"
            matched = [pattern for pattern in patterns if re.search(pattern, name)]
            if keyword == "properties" and name in given:
                errors += self.errors_of(item, given[name], place)
            elif keyword == "patternProperties":
                errors += [error for p in matched for error in self.errors_of(item, given[p], place)]
            elif keyword == "additionalProperties" and name not in listed and not matched:
                errors += self.errors_of(item, given, place)
        return errors

    def _check_items(self, keyword: str, given: Any, value: Any, schema: Any, where: str) -> list[str]:
        if isinstance(given, list):  # one schema per place; before 2020-12 `items` could be that list
            pairs = list(zip(value, given))  # noqa: B905 (there may be more or fewer)
            first = 0
        else:
            first = len(schema.get("prefixItems", ()))
            pairs = [(item, given) for item in value[first:]]
        places = enumerate(pairs, start=first)
        return [error for i, pair in places for error in self.errors_of(*pair, f"{where}[{i}]")]

    def _check_combination(self, keyword: str, given: Any, value: Any, where: str) -> list[str]:
        if keyword == "not":
            return [] if self.errors_of(value, given, where) else [f"{where} is what `not` excludes"]
        branches = [self.errors_of(value, schema, where) for schema in given]
        if keyword == "allOf":
            return [error for errors in branches for error in errors]
        num_fitting = sum(not errors for errors in branches)
        if num_fitting == 1 or (keyword == "anyOf" and num_fitting):
            return []
        if num_fitting:
            return [f"{where} fits {num_fitting} of the {len(branches)} schemas of oneOf, not just one"]
        reasons = "; ".join(errors[0] for errors in branches)
        return [f"{where} fits none of the {len(branches)} schemas of {keyword} ({reasons})"]

    def _check_reference(self, target: Any, value: Any, where: str) -> list[str]:
        if not isinstance(target, str) or not re.fullmatch(r"#(/.*)?", target, re.DOTALL):
            return self._skip(where, "$ref", target)
        if (
            target,
            where,
        ) in self._open_references:  # an endless reference to the same value: it can find no error
            return self._skip(where, "$ref", target)
        schema = self.root
        for step in target.split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            try:
                schema = schema[int(step)] if isinstance(schema, list) else schema[step]
            except (KeyError, IndexError, TypeError, ValueError):
                return self._skip(where, "$ref", target)
        self._open_references.add((target, where))
        try:
            return self.errors_of(value, schema, where)
        finally:
            self._open_references.remove((target, where))


def is_kind(value: Any, kind: str) -> bool:
    """A bool is no number, and 1.0 is an integer."""
    if isinstance(value, bool):
        return kind == "boolean"
    whole = kind != "integer" or isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, JSON_KINDS[kind]) and whole


def is_multiple(value: float, step: float) -> bool:
    if isinstance(value, int) and isinstance(step, int):
        return value % step == 0
    quotient = value / step  # 0.3 / 0.1 is 2.9999999999999996
    return math.isclose(quotient, round(quotient), rel_tol=1e-12, abs_tol=0)


def is_unique(items: list[Any]) -> bool:
    return len(set(map(canonical, items))) == len(items)


def canonical(value: Any) -> Any:
    """Hashable, and equal where JSON Schema calls two values equal: 1 and 1.0, but not 1 and true."""
    if isinstance(value, bool):
        return (bool, value)
    if isinstance(value, dict):
        return (dict, frozenset((key, canonical(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return (list, tuple(map(canonical, value)))
    return value


def shorten(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= limit else text[: limit - 3] + "..."

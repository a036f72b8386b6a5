"""Tools to the text that declares them in the prompt: JSON schemas in, TypeScript out.

The model reads its tools as the body of a TypeScript namespace. From

    {"type": "function", "function": {"name": "weather", "description": "Weather of a day.", "parameters": {
        "type": "object", "required": ["city"], "properties": {
            "days": {"type": "integer", "description": "How many?", "minimum": 1, "default": 3},
            "city": {"type": "string"}}}}}

comes, with `# Tools` and `## functions` above and a newline at the end:

    namespace functions {
    // Weather of a day.
    type weather = (_: {
      city: string,
      // How many?
      // minimum: 1
      // Default: 3
      days?: number
    }) => any;
    }

Keys are sorted, required fields come first, and each entry of `$defs` becomes an `interface` above the function. The
text is what the model was trained on, so its quirks are kept: enum strings are not escaped, `True` and `None` are
spelled as in Python, names are not quoted, an empty line in a description has no slashes. The result is for reading; no
TypeScript compiler would take all of it.

A schema that has no such form (`oneOf`, `allOf` or `const` without a type, `#/definitions/...`, tuples) is not
a user error: the whole list is then written as compact JSON, as it was in training, and a warning says why.
"""

import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from transformers.utils import get_json_schema, logging
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

logger = logging.get_logger(__name__)

# Constraints that are shown, by type and in the order in which they are shown; all others are left out.
CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
# How the members of a list of types are written. Keywords next to such a list (`items`, `properties`) are not read.
UNION_MEMBERS = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
# What an enum may hold besides None. bool is an int in Python, and the declaration takes it for one.
ENUM_KINDS: dict[str, Any] = {"string": str, "number": (int, float), "integer": int, "boolean": bool}
DEFINITIONS = "#/$defs/"


class UnsupportedSchema(ValueError):
    """A schema that the TypeScript declaration cannot express. The message names the tool and the place in it."""


# From what a user passes to a list of dicts


def normalize_tools(tools: Iterable[Any] | None) -> list[dict[str, Any]] | None:
    """The tools as new dicts with sorted keys; None if there are none.

    Each tool is one of
    - a dict {"type": "function", "function": {"name", "description", "parameters"}}, or the inner dict alone (also with
      `"type": "function"` beside the name); a dict of another type is kept as it is;
    - a Python function with type hints and a Google style docstring;
    - a class that offers `model_json_schema()`, as pydantic models do: named after the class;
    - an object that offers `model_dump()`, which returns one of the dicts above.

    Raises ValueError with the index of the tool and the field for everything else.
    """
    if isinstance(tools, (str, Mapping)) or (tools is not None and not isinstance(tools, Iterable)):
        raise ValueError(f"tools must be a list of tools, not {type(tools).__name__}")
    return [normalize_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools or ())] or None


def normalize_tool(tool: Any, where: str) -> dict[str, Any]:
    given = tool_as_dict(tool, where)
    if "function" not in given and "name" in given and given.get("type") in (None, "function"):
        given = {"type": "function", "function": {k: v for k, v in given.items() if k != "type"}}
    if given.get("type") == "function":
        check_function(given.get("function"), f"{where}.function")
    try:
        normalized = deep_sort_dict(given)
        json.dumps(normalized)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply, or contains itself") from None
    except (TypeError, ValueError) as error:  # a key that is no string, a value such as a date
        raise ValueError(f"{where} cannot be written as JSON: {error}") from error
    return normalized


def tool_as_dict(tool: Any, where: str) -> Mapping[str, Any]:
    if isinstance(tool, Mapping):
        return tool
    if inspect.isclass(tool) and hasattr(tool, "model_json_schema"):
        # The description is written once, at the function; the title would only repeat the name.
        parameters = {k: v for k, v in tool.model_json_schema().items() if k not in ("title", "description")}
        function = {"name": tool.__name__, "parameters": parameters}
        if tool.__doc__:  # not inspect.getdoc, which would go on to the docstring of the base class
            function["description"] = inspect.cleandoc(tool.__doc__)
        return {"type": "function", "function": function}
    if not inspect.isclass(tool) and hasattr(tool, "model_dump"):
        dumped = tool.model_dump()
        if not isinstance(dumped, Mapping):
            raise ValueError(f"{where}.model_dump() must return a dict, not {type(dumped).__name__}")
        return dumped
    if callable(tool):
        try:
            return get_json_schema(tool)
        except (
            DocstringParsingException,
            TypeHintParsingException,
            AttributeError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{where} is a function that lacks type hints or a docstring: {error}"
            ) from error
    raise ValueError(f"{where} must be a dict, a function or a pydantic model, not {type(tool).__name__}")


def check_function(function: Any, where: str) -> None:
    """An empty function is no error: such an entry is not declared."""
    if not function and (function is None or isinstance(function, Mapping)):
        return
    if not isinstance(function, Mapping):
        raise ValueError(f"{where} must be a dict, not {type(function).__name__}")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}.name must be a non-empty string, not {name!r}")
    if not isinstance(description, (str, type(None))):
        raise ValueError(f"{where}.description must be a string, not {type(description).__name__}")
    if not isinstance(function.get("parameters"), (Mapping, type(None))):
        raise ValueError(
            f"{where}.parameters must be a dict (a JSON schema), not {type(function['parameters']).__name__}"
        )


def deep_sort_dict(value: Any) -> Any:
    """A copy in which the keys of every dict are in code point order; lists keep theirs."""
    if isinstance(value, Mapping):
        return {key: deep_sort_dict(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [deep_sort_dict(item) for item in value]
    return value


# From dicts to text


def render_tool_declaration(tools: list[dict[str, Any]] | None) -> str:
    """What the prompt says about tools that `normalize_tools` returned: TypeScript if all of them can be expressed, else
    compact JSON. A reason for JSON, and an entry that TypeScript leaves out, is logged once. Empty without tools."""
    if not tools:
        return ""
    try:
        declaration = encode_tools_to_typescript_style(tools)
    except UnsupportedSchema as error:
        logger.warning_once(f"The tools are declared as JSON instead of TypeScript: {error}")  # type: ignore[attr-defined]
        declaration = ""
    else:
        for index, tool in enumerate(tools if declaration else ()):
            if usable_function(tool) is None:
                logger.warning_once(  # type: ignore[attr-defined]
                    f"tools[{index}] is not declared: type {tool.get('type')!r} without a function"
                )
    return declaration or json.dumps(tools, ensure_ascii=False, separators=(",", ":"))


def encode_tools_to_typescript_style(tools: list[dict[str, Any]]) -> str:
    """The declaration of all entries of type `function`; an empty string if there is none.

    Raises `UnsupportedSchema` if one of them has no TypeScript form. References are written by name and never followed,
    so a schema may refer to itself.
    """
    written = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise UnsupportedSchema(f"tools[{index}] is a {type(tool).__name__}, not a dict")
        if function := usable_function(tool):
            written.append(encode_function(function))
    if not written:
        return ""
    return "\n".join(["# Tools", "", "## functions", "namespace functions {", *written, "}", ""])


def usable_function(tool: Mapping[str, Any]) -> Any:
    return (tool.get("function") or None) if tool.get("type") == "function" else None


def encode_function(function: Any) -> str:
    if not isinstance(function, Mapping):
        raise UnsupportedSchema(f"function is a {type(function).__name__}, not a dict")
    name = function.get("name", "function")
    try:
        return FunctionWriter(name).write(deep_sort_dict(function))
    except RecursionError:
        raise UnsupportedSchema(f"tool {name!r}: the schema is nested too deeply") from None
    # TypeError: keys that do not sort, a default that is no JSON.
    except (UnsupportedSchema, TypeError) as error:
        raise UnsupportedSchema(f"tool {name!r}, {error}") from error


class Field(NamedTuple):
    required: bool
    text: str  # comment lines and `name: type`


class FunctionWriter:
    """Writes one function, and remembers what its schema has defined so far and whether it refers to itself.

    Every `path` is a place in the schema, for messages. Every `indent` is that of the line on which a type begins.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.definitions: dict[str, Any] = {}
        self.refers_to_root = False

    def write(self, function: dict[str, Any]) -> str:
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise unsupported("parameters", f"is a {type(parameters).__name__}, not a dict")
        fields, rest = self.read_fields(parameters, "  ", "parameters")
        interfaces, signature = [], object_of(required_first(fields) + rest, "")
        # Decided by the root alone: a definition that mentions `#`, which is read below, changes nothing any more.
        if self.refers_to_root:
            interfaces = ["interface parameters {\n" + ",\n".join(field.text for field in fields) + "\n}"]
            signature = "parameters"
        interfaces += self.write_interfaces()
        comments = description_lines(function, "", "description")
        return "\n".join([*interfaces, *comments, f"type {self.name} = (_: {signature}) => any;"])

    def write_interfaces(self) -> list[str]:
        written: dict[str, str] = {}
        while pending := [name for name in self.definitions if name not in written]:
            for name in pending:  # a definition may add further ones
                schema, path = self.definitions[name], f"$defs.{name}"
                interface = f"interface {name} {self.type_of(schema, '', path)}"
                written[name] = "\n".join([*description_lines(schema, "", path), interface])
        return list(written.values())

    def type_of(self, schema: Any, indent: str, path: str) -> str:
        """The type alone, without comments. The order of the checks matters: anyOf before enum before type."""
        if schema is True or schema == {}:
            return "any"
        if schema is False:
            logger.warning_once(f"tool {self.name!r}, {path}: the schema `false` is declared as null")  # type: ignore[attr-defined]
            return "null"
        if not isinstance(schema, dict):
            raise unsupported(path, f"is a {type(schema).__name__}, not a schema")
        if "$ref" in schema:
            return self.reference(schema["$ref"], path)
        if "anyOf" in schema:
            members = enumerate(expect_list(schema["anyOf"], f"{path}.anyOf"))
            return " | ".join(self.type_of(member, indent, f"{path}.anyOf[{i}]") for i, member in members)
        if "enum" in schema:
            return enum_of(schema, path)
        kind = schema.get("type")
        if isinstance(kind, list):
            return union_of(kind, path)
        if kind == "object":
            fields, rest = self.read_fields(schema, indent + "  ", path)
            return object_of(required_first(fields) + rest, indent)
        if kind == "array":
            return self.array(schema.get("items"), indent, path)
        if not isinstance(kind, str):
            raise unsupported(path, f"has no type, only {', '.join(schema)}")
        return "number" if kind == "integer" else kind

    def reference(self, target: Any, path: str) -> str:
        if target == "#":
            self.refers_to_root = True
            return "parameters"
        if not isinstance(target, str) or not target.startswith(DEFINITIONS):
            raise unsupported(path, f"has $ref {target!r}; only '#' and '{DEFINITIONS}NAME' can be written")
        name = target.removeprefix(DEFINITIONS)
        if name not in self.definitions:  # also one that is defined further down
            raise unsupported(path, f"has $ref {target!r}, and no such definition stands before it")
        return name

    def array(self, items: Any, indent: str, path: str) -> str:
        if not items:
            return "Array<any>"
        path = f"{path}.items"
        comments = comment_lines(items, indent + "  ", path)
        if not comments:
            return f"Array<{self.type_of(items, indent, path)}>"
        item = indent + "  " + self.type_of(items, indent + "  ", path)
        return "\n".join(["Array<", *comments, item, indent + ">"])

    def read_fields(self, schema: dict[str, Any], indent: str, path: str) -> tuple[list[Field], list[str]]:
        """The fields of an object, sorted by name, and the entry for additionalProperties, if there is one.

        Definitions count from here on, so the order of reading matters: it is that of the sorted keys.
        """
        self.definitions.update(expect_dict(schema.get("$defs"), f"{path}.$defs"))
        rest = []
        additional = schema.get("additionalProperties")
        if additional is not None:
            kind = "never"
            if additional is not False:
                kind = self.type_of(additional, indent, f"{path}.additionalProperties")
            rest.append(f"{indent}[k: string]: {kind}")
        required = expect_list(schema.get("required"), f"{path}.required")
        fields = []
        for name, value in expect_dict(schema.get("properties"), f"{path}.properties").items():
            place = f"{path}.properties.{name}"
            optional = "" if name in required else "?"
            lines = [
                *comment_lines(value, indent, place),
                *default_lines(value, indent),
                f"{indent}{name}{optional}: {self.type_of(value, indent, place)}",
            ]
            fields.append(Field(name in required, "\n".join(lines)))
        return fields, rest


def required_first(fields: list[Field]) -> list[str]:
    return [field.text for field in sorted(fields, key=lambda field: not field.required)]


def object_of(entries: list[str], indent: str) -> str:
    return "{\n" + ",\n".join(entries) + "\n" + indent + "}" if entries else "{}"


def union_of(kinds: list[Any], path: str) -> str:
    for kind in kinds:
        if not isinstance(kind, str) or kind not in UNION_MEMBERS:
            raise unsupported(path, f"has type {kinds!r}, in which {kind!r} is unknown")
    return " | ".join(UNION_MEMBERS[kind] for kind in kinds)


def enum_of(schema: dict[str, Any], path: str) -> str:
    values = expect_list(schema["enum"], f"{path}.enum")
    kind = schema.get("type")
    if isinstance(kind, list) and len(kind) == 2 and "null" in kind:
        kind = kind[1 - kind.index("null")]
    for value in values:
        allowed = ENUM_KINDS.get(kind, ()) if isinstance(kind, str) else ()
        if kind is not None and value is not None and not isinstance(value, allowed):
            raise unsupported(path, f"has enum value {value!r}, which is not of type {schema['type']!r}")
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values)


def comment_lines(schema: Any, indent: str, path: str) -> list[str]:
    """Description and constraints. Of a reference, an anyOf, an enum or a list of types only the description."""
    if not isinstance(schema, dict):
        return []
    lines = description_lines(schema, indent, path)
    kind = schema.get("type")
    if isinstance(kind, str) and not schema.keys() & {"$ref", "anyOf", "enum"}:
        names = [name for name in CONSTRAINTS.get(kind, ()) if schema.get(name) is not None]
        if names:
            lines.append(f"{indent}// " + ", ".join(f"{name}: {schema[name]}" for name in names))
    return lines


def description_lines(schema: Any, indent: str, path: str) -> list[str]:
    description = schema.get("description") if isinstance(schema, dict) else None
    if not description:
        return []
    if not isinstance(description, str):
        raise unsupported(path, f"has a description that is a {type(description).__name__}")
    return [f"{indent}// {line}" if line else "" for line in description.split("\n")]


def default_lines(schema: Any, indent: str) -> list[str]:
    default = schema.get("default") if isinstance(schema, dict) else None
    if default is None:
        return []
    plain = isinstance(default, (int, float))
    return [f"{indent}// Default: {default!r}" if plain else f"{indent}// Default: {to_json(default)}"]


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def expect_dict(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, (dict, type(None))):
        raise unsupported(path, f"is a {type(value).__name__}, not a dict")
    return value or {}


def expect_list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, (list, type(None))):
        raise unsupported(path, f"is a {type(value).__name__}, not a list")
    return value or []


def unsupported(path: str, reason: str) -> UnsupportedSchema:
    return UnsupportedSchema(f"{path} {reason}")

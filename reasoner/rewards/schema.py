"""Is the answer JSON of a given shape? The reward `json_schema`. Standard library only.

Left out: `$ref`, `format` and whatever else JSON Schema has beyond the keywords below; a schema that uses it is refused
rather than half checked.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from reasoner.rewards.answers import after_thinking

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value == int(value),
}
FENCE = "```"
MAX_CHARS = 100_000


def json_schema(completion: str, schema: Mapping[str, Any]) -> float:
    """1.0 if the text after `</think>` is one JSON value, alone or in one code fence, that the schema allows; else 0.0.

    For structured output; the schema is in the part's options. Prose around the value, two values, a key written twice,
    NaN and values nested too deep to read earn 0.0. Raises ValueError for a schema with a keyword that isn't checked.
    """
    _check(schema)
    text = (after_thinking(completion) or "").strip()
    if text.startswith(FENCE) and text.endswith(FENCE) and text.count(FENCE) == 2:
        text = text.removeprefix(FENCE).removesuffix(FENCE).removeprefix("json")
    if len(text) > MAX_CHARS:
        return 0.0
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_refused, parse_float=_finite)
        return float(allows(schema, value))
    except (ValueError, RecursionError):
        return 0.0


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is written twice")
    return found


def _refused(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is too large")
    return number


def _key(value: Any) -> str:
    """The same text for values that are equal as JSON: 1 is 1.0, and true is not 1."""
    value = _plain(value)
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _of_type(names: Any, value: Any) -> bool:
    return any(TYPES[name](value) for name in ([names] if isinstance(names, str) else names))


def _properties(schema: Mapping[str, Any], value: dict[str, Any]) -> bool:
    known = schema.get("properties", {})
    rest = schema.get("additionalProperties", True)
    return all(allows(known.get(name, rest), inner) for name, inner in value.items())


# What each keyword asks of a value of the kind that it speaks of; values of other kinds pass, as in JSON Schema.
OF_ALL: dict[str, Callable[[Any, Any], bool]] = {
    "type": _of_type,
    "enum": lambda options, value: _key(value) in {_key(option) for option in options},
    "const": lambda wanted, value: _key(wanted) == _key(value),
    "anyOf": lambda schemas, value: any(allows(schema, value) for schema in schemas),
    "allOf": lambda schemas, value: all(allows(schema, value) for schema in schemas),
    "oneOf": lambda schemas, value: sum(allows(schema, value) for schema in schemas) == 1,
    "not": lambda schema, value: not allows(schema, value),
}
OF_KIND: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("number", lambda limit, value: value >= limit),
    "maximum": ("number", lambda limit, value: value <= limit),
    "exclusiveMinimum": ("number", lambda limit, value: value > limit),
    "exclusiveMaximum": ("number", lambda limit, value: value < limit),
    "minLength": ("string", lambda limit, value: len(value) >= limit),
    "maxLength": ("string", lambda limit, value: len(value) <= limit),
    "pattern": ("string", lambda pattern, value: bool(re.search(pattern, value))),
    "items": ("array", lambda schema, value: all(allows(schema, item) for item in value)),
    "minItems": ("array", lambda limit, value: len(value) >= limit),
    "maxItems": ("array", lambda limit, value: len(value) <= limit),
    "uniqueItems": ("array", lambda asked, value: not asked or len({_key(item) for item in value}) == len(value)),
    "required": ("object", lambda names, value: all(name in value for name in names)),
}
WHOLE = ("properties", "additionalProperties")
NOTES = ("title", "description", "default", "examples", "$schema", "$id", "$comment")


def allows(schema: Any, value: Any) -> bool:
    """True if the schema allows the value; True and False are schemas too."""
    if isinstance(schema, bool):
        return schema
    for keyword, asked in schema.items():
        if keyword in OF_ALL and not OF_ALL[keyword](asked, value):
            return False
        if keyword in OF_KIND:
            kind, holds = OF_KIND[keyword]
            if TYPES[kind](value) and not holds(asked, value):
                return False
    return not (isinstance(value, dict) and any(keyword in schema for keyword in WHOLE)) or _properties(schema, value)


def _check(schema: Any) -> None:
    """Raise ValueError for a schema that `allows` would not check in full."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"schema: {schema!r} is no JSON schema")
    known = [*OF_ALL, *OF_KIND, *WHOLE, *NOTES]
    for keyword, asked in schema.items():
        if keyword not in known:
            raise ValueError(f"schema: the keyword {keyword!r} isn't checked; there are {', '.join(known)}")
        if keyword == "type":
            unknown = [name for name in ([asked] if isinstance(asked, str) else asked) if name not in TYPES]
            if unknown:
                raise ValueError(f"schema: there is no type {unknown[0]!r}; there are {', '.join(TYPES)}")
        inner = {
            "properties": lambda asked: asked.values(),
            "items": lambda asked: [asked],
            "additionalProperties": lambda asked: [asked],
            "not": lambda asked: [asked],
        }
        lists = ("anyOf", "allOf", "oneOf")
        for part in inner[keyword](asked) if keyword in inner else asked if keyword in lists else ():
            _check(part)

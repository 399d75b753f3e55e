"""JSON schemas of the kinds that applications ask for, each with texts of bounded length."""

TEXT, SHORT = {"type": "string", "maxLength": 12}, {"type": "string", "maxLength": 4}
COUNT = {"type": "integer", "minimum": 0, "maximum": 999}


def thing(required=None, **properties):
    """An object of these properties, all of which are required unless `required` says which."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


POINT = thing(x=COUNT, y=COUNT)
SCHEMAS = {
    "text": TEXT,
    "least length": {"type": "string", "minLength": 3, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "address": {"type": "string", "format": "ipv4"},
    "integer": COUNT,
    "negative": {"type": "integer", "minimum": -20, "maximum": -3},
    "above": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 7},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "multiple": {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 5},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "choice": {"enum": ["red", "green", 3, None, {"a": [1]}]},
    "constant": {"const": {"kind": "x", "n": [1, 2.5, True]}},
    "types": {"type": ["boolean", "null"]},
    "list": {"type": "array", "items": COUNT, "minItems": 1, "maxItems": 4},
    "empty list": {"type": "array", "items": TEXT, "maxItems": 0},
    "pair": {"type": "array", "prefixItems": [SHORT, COUNT], "items": False, "minItems": 2},
    "object": thing(name=TEXT, age=COUNT, good={"type": "boolean"}),
    "optional": thing(["a"], a=SHORT, b=COUNT, c={"type": "null"}),
    "nested": thing(user=thing(name=SHORT, at=POINT), tags={"type": "array", "items": SHORT, "maxItems": 3}),
    "any of": {"anyOf": [thing(kind={"const": "circle"}, r=COUNT), thing(kind={"const": "box"}, w=COUNT, h=COUNT)]},
    "one of": {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 5}, {"type": "string", "maxLength": 3}]},
    "all of": {"allOf": [{"type": "object", "properties": {"a": COUNT}, "required": ["a"]}, thing(a=COUNT, b=SHORT)]},
    "reference": {"$defs": {"point": POINT}, "type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 3},
    "tree": {
        "$defs": {"node": thing(["v"], v={"type": "boolean"}, left={"$ref": "#/$defs/node"})},
        "$ref": "#/$defs/node",
    },
    "nullable": thing(a={"type": ["string", "null"], "maxLength": 3}, b={"anyOf": [POINT, {"type": "null"}]}),
    "map of patterns": {"type": "object", "patternProperties": {"^[a-z]{1,2}$": COUNT}, "additionalProperties": False, "maxProperties": 3},
    "answer": thing(thought=TEXT, answer={"enum": ["yes", "no"]}, confidence={"type": "number", "minimum": 0, "maximum": 1}),
    "odd names": thing(**{'a "b"': COUNT, "\u00e9\n": SHORT, "": {"type": "null"}}),
}

"""Answers that models write, and the message that each of them is.

A case is (form, where the answer begins, text, reasoning, content, calls), with calls as (name, arguments).
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "metric": {"type": "boolean"},
                    "at": {"$ref": "#/$defs/Place"},
                    "tags": {"anyOf": [{"type": "array"}, {"type": "null"}]},
                    "level": {"enum": [1, 2.5, "high"]},
                    "ratio": {"type": "number"},
                },
                "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "number"}}}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def hermes(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def coder(name, **parameters):
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


OSLO, NOW = ("weather", {"city": "Oslo"}), ("now", {})
ONE, EMPTY = hermes("weather", '{"city": "Oslo"}'), hermes("now", "{}")
TRICKY = {"city": 'a "quoted" </tool_call> {[ \\ \n 你好 🙂', "x": [1, {"y": None}], "z": -1.5e3, "t": True}
TRICKY_TEXT = '{"city": "a \\"quoted\\" </tool_call> {[ \\\\ \\n 你好 🙂", "x": [1, {"y": null}], "z": -1.5e3, "t": true}'
X_OSLO, X_NOW = coder("weather", city="Oslo"), coder("now")

CASES = {
    "content alone": ("hermes", "answer", "Hello 你好 🙂.\n", None, "Hello 你好 🙂.\n", []),
    "nothing": ("hermes", "before", "", None, "", []),
    "a call": ("hermes", "answer", ONE, None, None, [OSLO]),
    "a call without arguments": ("hermes", "answer", EMPTY, None, None, [NOW]),
    "content before a call": ("hermes", "answer", f"Let me look.\n\n{ONE}", None, "Let me look.", [OSLO]),
    "content after a call": ("hermes", "answer", f"{ONE}\nDone.", None, "Done.", [OSLO]),
    "content around a call": ("hermes", "answer", f"A\n{ONE}\nB\n", None, "A\nB", [OSLO]),
    "two calls": ("hermes", "answer", f"{ONE}\n{EMPTY}\n", None, None, [OSLO, NOW]),
    "two calls without a newline": ("hermes", "answer", ONE + EMPTY, None, None, [OSLO, NOW]),
    "strings with tags and escapes": ("hermes", "answer", hermes("weather", TRICKY_TEXT), None, None, [("weather", TRICKY)]),
    "on one line": ("hermes", "answer", '<tool_call>{"name":"now","arguments":{}}</tool_call>', None, None, [NOW]),
    "arguments first": (
        "hermes",
        "answer",
        '<tool_call>{"arguments": {"city": "Oslo"}, "name": "weather"}</tool_call>',
        None,
        None,
        [OSLO],
    ),
    "arguments as text": ("hermes", "answer", hermes("weather", '"{\\"city\\": \\"Oslo\\"}"'), None, None, [OSLO]),
    "no arguments": ("hermes", "answer", '<tool_call>\n{"name": "now"}\n</tool_call>', None, None, [NOW]),
    "a newline that is not escaped": ("hermes", "answer", hermes("f", '{"a": "x\ny"}'), None, None, [("f", {"a": "x\ny"})]),
    "the closing tag is missing": ("hermes", "answer", '<tool_call>\n{"name": "now", "arguments": {}}', None, None, [NOW]),
    "cut in the closing tag": ("hermes", "answer", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool', None, None, [NOW]),
    "cut in a call": ("hermes", "answer", 'A <tool_call>\n{"name": "now", "arg', None, 'A <tool_call>\n{"name": "now", "arg', []),
    "cut in a tag": ("hermes", "answer", "A <tool_c", None, "A <tool_c", []),
    "a tag that is text": ("hermes", "answer", "The tag <tool_call> opens.", None, "The tag <tool_call> opens.", []),
    "broken JSON": ("hermes", "answer", hermes("f", '{"a": tru}'), None, hermes("f", '{"a": tru}'), []),
    "broken, then whole": (
        "hermes",
        "answer",
        f'<tool_call>{{"name": f}}</tool_call>{ONE}',
        None,
        '<tool_call>{"name": f}</tool_call>',
        [OSLO],
    ),
    "a call in a broken one": ("hermes", "answer", f"<tool_call>{ONE}", None, "<tool_call>", [OSLO]),
    "a key twice": ("hermes", "answer", hermes("f", '{"a": 1, "a": 2}'), None, hermes("f", '{"a": 1, "a": 2}'), []),
    "no name": ("hermes", "answer", '<tool_call>{"arguments": {}}</tool_call>', None, '<tool_call>{"arguments": {}}</tool_call>', []),
    "a list for arguments": ("hermes", "answer", hermes("f", "[1]"), None, hermes("f", "[1]"), []),
    "text after the JSON": (
        "hermes",
        "answer",
        '<tool_call>{"name": "f"} x</tool_call>',
        None,
        '<tool_call>{"name": "f"} x</tool_call>',
        [],
    ),
    "reasoning and content": ("hermes", "before", "<think>\nHm.\n\nYes.\n</think>\n\nHello", "Hm.\n\nYes.", "Hello", []),
    "no reasoning": ("hermes", "before", "Hello <think>", None, "Hello <think>", []),
    "empty reasoning": ("hermes", "before", "<think>\n\n</think>\n\nHello", None, "Hello", []),
    "reasoning and a call": ("hermes", "before", f"<think>\nHm.\n</think>\n\n{ONE}", "Hm.", None, [OSLO]),
    "a call in the reasoning": ("hermes", "before", f"<think>\n{ONE}\n</think>\n\nHello", ONE, "Hello", []),
    "reasoning that the prompt opens": ("hermes", "inside", "\nHm.\n</think>\n\nHello", "Hm.", "Hello", []),
    "reasoning without an end": ("hermes", "before", "<think>\nHm </thin", "Hm </thin", "", []),
    "reasoning, no form": (None, "before", f"<think>Hm</think>{ONE}\n", "Hm", f"{ONE}\n", []),
    "the second form": ("qwen3_coder", "answer", f"I look.\n{X_OSLO}", None, "I look.", [OSLO]),
    "the second form, two calls": ("qwen3_coder", "answer", f"{X_OSLO}\n{X_NOW}", None, None, [OSLO, NOW]),
    "the second form, types": (
        "qwen3_coder",
        "answer",
        coder("weather", city="12", days="3", metric="True", at='{"x": 1}', tags="null", level="high", ratio="2", other="5"),
        None,
        None,
        [("weather", {"city": "12", "days": 3, "metric": True, "at": {"x": 1}, "tags": None, "level": "high", "ratio": 2, "other": "5"})],
    ),
    "the second form, many lines": (
        "qwen3_coder",
        "answer",
        coder("weather", city="a\n\n <b>\n"),
        None,
        None,
        [("weather", {"city": "a\n\n <b>\n"})],
    ),
    "the second form, no tag of a call": ("qwen3_coder", "answer", X_OSLO[12:-13] + " Done.", None, "Done.", [OSLO]),
    "the second form, no first tag": ("qwen3_coder", "answer", X_OSLO[12:], None, None, [OSLO]),
    "the second form, wrong types": ("qwen3_coder", "answer", coder("weather", days="soon"), None, None, [("weather", {"days": "soon"})]),
    "the second form, broken": (
        "qwen3_coder",
        "answer",
        "<tool_call>\n<function=f>\nx</function>",
        None,
        "<tool_call>\n<function=f>\nx</function>",
        [],
    ),
    "the second form, cut": ("qwen3_coder", "answer", X_OSLO[:50], None, X_OSLO[:50], []),
    "the second form, a key twice": (
        "qwen3_coder",
        "answer",
        "<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=a>\n2\n</parameter>\n</function>",
        None,
        "<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=a>\n2\n</parameter>\n</function>",
        [],
    ),
}

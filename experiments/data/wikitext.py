"""WikiText's files of spaced tokens: articles, and their text as it was before it was taken apart."""

import re

TITLE = re.compile(r"\s*= (?!= )(.*\S) =\s*")
SEPARATOR = re.compile(r" ?@([-,.])@ ?")
RULES = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r" ([.,;:!?%)\]}…’])", r"\1"),  # "end ." to "end."
        (r"([(\[{$£€‘]) ", r"\1"),
        (r" ('(?:s|t|re|ve|m|ll|d)\b)", r"\1"),
        (r" n 't\b", "n't"),
        (r"(?<=\w) ' (?=s\b)", "'"),
        (r"(?<=s) ' (?=\w)", "' "),
        (r" (°|′|″)", r"\1"),
        (r" ([–—/]) ", r"\1"),
    )
]
QUOTED = re.compile(r"(\") ([^\"]*?) (\")")


def is_title(line):
    """Whether the line opens an article, ` = Title = `, and no section, ` = = Section = = `."""
    match = TITLE.fullmatch(line)
    return bool(match) and not match[1].endswith(" =")


def detokenize(text):
    """Spaced tokens as running text: `@-@`, `@,@`, `@.@` joined, the spaces around marks and inside quotes and brackets dropped.

    Headings become their title alone. What the spaces cannot tell is guessed, so some quotes stay apart; `<unk>` stays.
    """
    return "\n".join(map(_line, text.split("\n")))


def _line(line):
    line = SEPARATOR.sub(r"\1", line.strip())
    if re.fullmatch(r"((?:= )+).*\S( =)+", line):
        line = line.strip("= ")
    line = QUOTED.sub(r"\1\2\3", line)
    for pattern, to in RULES:
        line = pattern.sub(to, line)
    return line

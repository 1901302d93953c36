"""What the end of a line must not tear apart: a number and its unit or its spread, the two parts of a reference."""

import re

UNITS = r"(?:nats?|bits?|bytes|seconds?|minutes?|hours?|[KMG]i?B)\b"
TORN = re.compile(
    rf"(?:(?<=\d)|(?<=-->)) (?={UNITS}|±)"  # behind the source of a number too
    r"|(?<=±) (?=[\d<])|(?<=\d) (?=× \d)|(?<=\d ×) (?=\d)"  # signs that no formula has
    r"|(?:(?<=\bFig\.)|(?<=\bEq\.)|(?<=\bTable)|(?<=\bExercise)) (?=\d)"
)


def unbroken(text: str, space: str = "\N{NO-BREAK SPACE}") -> str:
    """The text with a space there that holds both sides together."""
    return TORN.sub(space, text)

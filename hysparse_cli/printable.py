"""Text that came from a file or a user, made safe to show: one line, no control characters.

A name in a checkpoint may hold escape sequences, newlines, marks that turn the direction of the
text, or 100,000 letters.
"""

LONGEST = 300


def printable(text: object, longest: int | None = LONGEST) -> str:
    """``text`` with each unprintable character as its escape, such as ``\\x1b``.

    Args:
        longest: the middle of what is longer is left out; None leaves nothing out.
    """
    shown = str(text)
    if longest is not None and len(shown) > longest:
        shown = f"{shown[: longest // 2]}…{shown[-longest // 3 :]}"
    if shown.isprintable():
        return shown
    return "".join(map(_escaped, shown))


def single_line(error: object, longest: int | None = LONGEST) -> str:
    """The message of an error as one printable line, its line breaks as spaces."""
    return printable(" ".join(str(error).split()), longest)


def cells(text: str) -> str:
    """``text`` with a mark in place of each unprintable character but the line break: what is laid
    out in columns keeps its width."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()

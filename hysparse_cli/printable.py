"""Makes text that came from a file or a user safe to show: one line, no control characters.

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
    """The message of an error as one printable line, its line breaks as spaces; of an exception
    that says nothing, its type."""
    said = " ".join(str(error).split())
    if not said and isinstance(error, BaseException):
        said = type(error).__name__
    return printable(said, longest)


def typed_line(error: BaseException) -> str:
    """The type and the message of an exception as one printable line: ``KeyError: 'x'``."""
    kind, said = type(error).__name__, single_line(error)
    return kind if said == kind else f"{kind}: {said}"


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

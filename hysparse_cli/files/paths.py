"""Checks paths and names of models as people give them."""

import os


def check_given(text: str) -> str:
    """``text``, where it can be a path or a name.

    Raises: ValueError where it is empty or blank, as an unset variable is, or no system could have
        such a path.
    """
    if not text.strip():
        raise ValueError("it is empty: was a variable meant that is not set?")
    if "\0" in text:
        raise ValueError("it holds a NUL character, which no path can")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "it is no UTF-8 text in this locale: rename it, or set LC_ALL=C.UTF-8"
        ) from None
    return text


def expanded(text: str) -> str:
    """``text`` with ``~`` as the user's home.

    Raises: ValueError as ``check_given`` does.
    """
    return os.path.expanduser(check_given(text))

# SPDX-License-Identifier: Apache-2.0
"""What other packages say of a damaged file, made fit for one of our lines."""

__all__ = ["said"]


def said(error: BaseException, most: int = 120) -> str:
    r"""The message on one line, without a traceback in it and without characters that a terminal obeys.

    Args:
        error: of a package that reads foreign bytes, and may quote them.
        most: characters.

    Example:
        >>> said(ValueError("bad tag \x1b[2J at 8C\nTraceback (most recent call last):"))
        'bad tag [2J at 8C'
        >>> said(EOFError())
        'EOFError'
    """
    text = str(error).partition("\nTraceback")[0]
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text.split())[:most] or type(error).__name__

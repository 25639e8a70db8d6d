"""Errors that the user can correct: one line on stderr, exit status 2, no traceback."""


class UserError(Exception):
    """An error that the user can correct; the message names the option, file or tensor at fault."""


def one_line(error: UserError | OSError) -> str:
    """Return the message on one line; unprintable characters, e.g. of file names, become escapes."""
    # An error from a data-loading worker has a traceback before its message.
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    return printable(text.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip())


def printable(text: str) -> str:
    """Return the text with escapes for unprintable characters, such as line breaks and terminal codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

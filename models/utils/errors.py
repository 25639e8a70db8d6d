"""Users' mistakes: one line on stderr, exit status 2, no traceback."""


class UserError(Exception):
    """What the user can put right; the message names the option, file or tensor at fault."""


def one_line(error: UserError | OSError) -> str:
    """The message, with what would break the line or not show (file names may hold it) as escapes."""
    # A data loader's worker process hands its error on behind a traceback.
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    return printable(text.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip())


def printable(text: str) -> str:
    """The text on one line, with escapes for what would break it, steer a terminal, or not show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

"""The one exception users meet: a sentence that says what is wrong, where, and how to mend it."""


def first_line(error: BaseException) -> str:
    """An exception's text, cut to its first line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class TokenGameError(Exception):
    """Bad input or an impossible request. The command line prints it alone, without a traceback, and exits with 2."""

"""The one exception users meet: a sentence that says what is wrong, where, and how to mend it."""


class TokenGameError(Exception):
    """Bad input or an impossible request. The command line prints it alone, without a traceback, and exits with 2."""

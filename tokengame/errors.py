"""The one exception that users meet: a sentence that says what is wrong, where, and how to fix it."""


class TokenGameError(Exception):
    """Bad input or an impossible request. The command line prints it without a traceback and exits with 2."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where the text is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, met where a run can stop; its text says what is kept and how to go on.

    Args:
        text: one sentence.
        number: of the signal.
    """

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.number = number

"""Exception for wrong input."""


class InputError(ValueError):
    """A file, key, shape or setting that the user gave is wrong.

    The message names it and says what to do. The command line prints the message without a traceback and
    exits with `exit_code`.
    """

    exit_code = 2

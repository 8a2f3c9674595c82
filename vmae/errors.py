"""The one exception for input that a person can mend."""


class InputError(ValueError):
    """A file, key, shape or setting given by the user is wrong.

    The message names the thing and says what to do. The command line prints it without a traceback and exits
    with 2.
    """

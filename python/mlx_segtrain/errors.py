"""The one exception for input that the user can mend."""


class InputError(ValueError):
    """Bad input. The message is one sentence: what is wrong, where, and what to do about it.

    The command line prints it without a traceback and exits with code 2.
    """

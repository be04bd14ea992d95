"""The one exception for problems that the person at the keyboard can solve."""


class UserError(ValueError):
    """Wrong input, whose message says what was found, what was expected and what to do.

    Scripts print the message as one line, without a traceback.
    """

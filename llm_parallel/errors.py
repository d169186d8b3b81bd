"""The one exception that a user can cause."""


class UserError(ValueError):
    """Something the user gave is wrong.

    The message is one sentence that names the field or file, the value, and what would be right. Commands print it
    without a traceback and exit with status 2.
    """


EXIT_USER_ERROR = 2

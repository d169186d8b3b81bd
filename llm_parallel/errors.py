"""The one exception that a user can cause."""


class UserError(ValueError):
    """Something the user gave is wrong.

    The message is one sentence that names the field or file, the value, and what would be right. Commands print it
    without a traceback and exit with status 2.
    """


EXIT_USER_ERROR = 2
EXIT_STOPPED = 3
"""Exit status of a run that saved its state and ended before all its steps were done, because it was asked to stop or
its time was up. Status 0 would tell a scheduler, and whoever waits for the run, that training is complete."""

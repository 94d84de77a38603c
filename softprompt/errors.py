"""What a user is told in one line: errors that end a run, and warnings."""


class InputError(ValueError):
    """A file, folder or option that cannot be used.

    The message is one line: the file or field, what was found, what was expected and the likely cause. Commands print it
    without a traceback and exit with code 2; anything else that is raised is a defect of ours and keeps its traceback.
    """


class RunError(RuntimeError):
    """A run that cannot go on although its input was right: numbers that diverged, memory that ran out.

    The message says at which step, what is left and what to change. Commands print it and exit with code 1.
    """


class InputWarning(UserWarning):
    """Input that can be used, but not as it was likely meant. Commands print its one line and hide what libraries warn of."""

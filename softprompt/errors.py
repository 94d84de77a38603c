"""The errors that end a run with one line instead of a traceback."""


class InputError(ValueError):
    """A file, folder or option that cannot be used.

    The message is one line: the file or field, what was found, what was expected and the likely cause. Commands print it
    without a traceback and exit with code 2; anything else that is raised is a defect of ours and keeps its traceback.
    """


class RunError(RuntimeError):
    """A run that cannot go on although its input was right: numbers that diverged, memory that ran out.

    The message says at which step, what is left and what to change. Commands print it and exit with code 1.
    """

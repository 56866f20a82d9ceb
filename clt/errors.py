"""The one error type that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in a config, a file or an argument, or a limit of the machine: something the user can mend.

    The message says what was found, what was wanted and the remedy. The command line prints it without a traceback
    and exits with status 2; everything else that is raised is a bug and keeps its traceback.
    """

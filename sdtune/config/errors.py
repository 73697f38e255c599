"""The two ways in which sdtune ends early, each with its exit code."""


class UserError(Exception):
    """Something the user has to change: one clear line that names the thing and the way out. Exit code 2."""


class RunFailed(Exception):
    """The run cannot go on, through no mistake in its settings; its last checkpoint is complete. Exit code 1."""

"""The exceptions whose text is for the user: asked for what cannot be, or computed what is no result."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: a configuration key, a path, an architecture, a file.

    Its text is one sentence that names the thing and says what would be right. Command lines print that sentence on
    stderr and exit with code 2, without a traceback and before any work starts.
    """


class TrainingError(Exception):
    """A run that computes nothing of use any more, such as a loss that is not a number.

    Its text is one sentence. Command lines print it on stderr and exit with code 1, so that NNI calls the trial failed.
    """

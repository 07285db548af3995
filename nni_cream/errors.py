"""The one exception that means "you asked for something that cannot be"."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: a configuration key, a path, an architecture, a file.

    Its text is one sentence that names the thing and says what would be right. Command lines print that sentence on
    stderr and exit with code 2, without a traceback and before any work starts.
    """

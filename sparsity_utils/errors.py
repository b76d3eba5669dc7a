"""The one exception of this package that a reader is meant to see."""


class InputError(ValueError):
    """Something the reader gave cannot be used: one sentence that says what, where, and what to do."""

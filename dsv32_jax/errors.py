"""Errors that a person can act on."""


class UserError(ValueError):
    """Bad input: one line that names the field, file, tensor or flag and says what would be right."""


class CheckpointWarning(UserWarning):
    """Something in a checkpoint's files that is passed over."""


class SurroundingsWarning(UserWarning):
    """Something that this user or machine lacks, without which it goes on."""

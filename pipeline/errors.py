"""Errors that a user can mend."""


class InputError(ValueError):
    """Something that the user gave is wrong; the message names field, value and remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}: {value!r}: {remedy}")

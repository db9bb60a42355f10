"""What a command says before it exits."""


class CommandError(Exception):
    """Something went wrong. The text says what, what is allowed, what to do."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status

"""What ends a training from outside: light to import, so that the command can name it."""


class NonFiniteLossError(ArithmeticError):
    """The loss or the gradient became infinite or NaN; the last save is untouched."""


class ProcessLostError(RuntimeError):
    """Another process of the training ended in the middle of it."""

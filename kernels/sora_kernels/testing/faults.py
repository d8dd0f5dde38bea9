"""What the tools that stand in for a GPU raise."""


class FaultError(AssertionError):
    """What a GPU or its driver would refuse, hang on, do wrongly, or leave undefined."""

"""What Megatron derives a class from when it is imported."""


class DelayedScaling:
    """A name only."""

"""The error a model folder, file or config can raise."""


class ModelError(Exception):
    """A model cannot be used as given: the message says which file, field or tensor and what to do."""

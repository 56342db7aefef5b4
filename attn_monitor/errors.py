"""What can go wrong, as types: every error that this package raises for its own reasons is an `AttnMonitorError`."""


class AttnMonitorError(Exception):
    """Base of all. The message says what was received, what was expected and what to do."""


class ProbeError(AttnMonitorError, ValueError):
    """The probe images cannot be used: missing, empty, unreadable, or of the wrong shape."""


class NoImagesError(ProbeError):
    """A batch holds no images that could be watched."""


class InputTypeError(ProbeError, TypeError):
    """What was given as a model is no module, or what was given as images no tensor of images."""


class TargetError(AttnMonitorError, ValueError):
    """``targets`` names something that is no submodule."""


class ArchiveError(AttnMonitorError, ValueError):
    """A file or a checkpoint's state is no readable snapshot or probe: damaged, of a newer version, or no such file."""


class ModelNameError(AttnMonitorError, ValueError):
    """The name that a command was given does not lead to a model."""


class CheckpointError(AttnMonitorError, ValueError):
    """A file of weights is not readable, holds code, or does not fit the model."""


class AttentionError(AttnMonitorError, RuntimeError):
    """Base of every refusal: no map is shown, and the message says why and what to do."""


class NoAttentionError(AttentionError):
    """The model ran, but no token attention was observed in it."""


class UnsupportedAttentionError(AttentionError):
    """Attention was observed, but it has no global row over the image's patches (windows, channels, pooling)."""


class QueryError(AttentionError):
    """The query asked for does not exist in this model, or more than one token could be meant."""


class LayerError(AttentionError):
    """The layer asked for does not exist in this model."""


class VerificationError(AttentionError):
    """The captured row times V is not what the model computed."""


class NonFiniteAttentionError(AttentionError):
    """The attention row holds NaN or infinity."""


class ForwardError(AttentionError):
    """The model refused the images, or gives a different answer each time it is asked."""


class HeadError(AttentionError):
    """The head asked for does not exist in this model."""


def text_of(error: BaseException) -> str:
    """What an exception says, also of a class that fails to say it."""
    try:
        return str(error)
    except Exception as another:  # of an exception class with a mistake of its own
        return f"(its text is {another!r})"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without a full stop; of an `OSError` without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

"""Exception types; every error that this package raises for its own reasons is an `AttnMonitorError`."""

from __future__ import annotations

from collections.abc import Iterator


class AttnMonitorError(Exception):
    """Base of all errors. The message names what was received, what was expected and what to do.

    Example:
        >>> try:
        ...     raise TargetError("targets: 'teacher' is no submodule")
        ... except AttnMonitorError as error:
        ...     print(error)
        targets: 'teacher' is no submodule
    """


class ArgumentError(AttnMonitorError, ValueError, TypeError):
    """An argument is of no kind, or has no value, that there is."""


class ProbeError(AttnMonitorError, ValueError):
    """The probe images are missing, empty, unreadable or of the wrong shape.

    Example:
        >>> issubclass(ProbeError, ValueError)
        True
    """


class NoImagesError(ProbeError):
    """A batch holds no images."""


class InputTypeError(ProbeError, TypeError):
    """The model is no module, or the images are no tensor of images."""


class TargetError(AttnMonitorError, ValueError):
    """``targets`` names something that is no submodule.

    Example:
        >>> issubclass(TargetError, ValueError)
        True
    """


class ArchiveError(AttnMonitorError, ValueError):
    """A file or a checkpoint's state is no valid snapshot or probe, or is of a newer version.

    Example:
        >>> issubclass(ArchiveError, ValueError)
        True
    """


class MissingPackageError(AttnMonitorError, ModuleNotFoundError):
    """An optional package is not installed. The message names the extra that brings it."""


class ModelNameError(AttnMonitorError, ValueError):
    """A command's argument names no model that can be loaded."""


class CheckpointError(AttnMonitorError, ValueError):
    """A file of weights is unreadable, holds code, or does not fit the model."""


class AttentionError(AttnMonitorError, RuntimeError):
    """Base of errors with which a model is refused, so that no map is shown.

    Example:
        >>> issubclass(QueryError, AttentionError) and issubclass(AttentionError, RuntimeError)
        True
    """


class NoAttentionError(AttentionError):
    """The model ran, but no attention between tokens was observed."""


class UnsupportedAttentionError(AttentionError):
    """Attention was observed, but it has no global row over the image's patches (windows, channels, pooling)."""


class QueryError(AttentionError):
    """The requested query does not exist in this model, or is ambiguous."""


class LayerError(AttentionError):
    """The requested layer does not exist in this model."""


class VerificationError(AttentionError):
    """The captured row times V differs from the model's own output."""


class NonFiniteAttentionError(AttentionError):
    """The attention row holds NaN or infinity."""


class ForwardError(AttentionError):
    """The model failed on the images, or its output differs between equal calls."""

    batch: int | None = None
    """How many images the model failed on, if it did."""
    failed: str = ""
    """What happened, without the remedy, if the model failed."""


class HeadError(AttentionError):
    """The requested head does not exist in this model."""


def check_whole(name: str, value: object, least: int, expected: str) -> None:
    """Raise `ArgumentError` unless an argument is None or a whole number of at least ``least``."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ArgumentError(f"{name}={value!r}: expected {expected}")


def text_of(error: BaseException) -> str:
    """Return an exception's text, even if its class fails to format it."""
    try:
        return str(error)
    except Exception as another:  # raised by a faulty exception class
        return f"(its text is {another!r})"


def chain_of(error: BaseException | None, *, contexts: bool = False) -> Iterator[BaseException]:
    """Yield an error and its chain of causes, each once, as an exception that is raised twice can be its own cause.

    Args:
        error: the error, None for an empty chain.
        contexts: whether to go on with the error that was being handled where there is no cause.
    """
    seen = set[int]()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (error.__context__ if contexts else None)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without full stop; for an `OSError`, without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def with_role(role: str, error: Exception) -> Exception:
    """Return a role's error with the role in its text."""
    if not isinstance(error, AttnMonitorError):
        return error
    same = type(error)(f"{role}: {error}")
    same.__cause__ = error.__cause__
    return same

"""What can go wrong with attention, as types: one per reason for which a map is refused."""


class AttentionError(RuntimeError):
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

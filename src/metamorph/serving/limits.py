"""What one client may ask of the server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits on a request. Those of the queue are the engine's."""

    max_body_mb: float = 32.0
    """Megabytes of its body."""
    max_images: int = 16
    """Images in it."""
    max_pixels: int = 2**25
    """Pixels of all its images together: a small file may unpack to gigabytes."""
    max_tokens: int | None = None
    """Tokens of prompt and answer together, visual ones included; None is the model's context."""
    client_timeout: float = 60.0
    """Seconds in which a client has to send its request, and to accept each piece of the answer."""

    @property
    def max_body(self) -> int:
        """Bytes of the body."""
        return int(self.max_body_mb * 1e6)

"""Every error whose text may reach a caller: it says what was wrong, what is allowed and what to try."""


class PerceptionError(Exception):
    """Base of the errors below. Anything else that escapes a tool is a fault of ours."""


class AccessError(PerceptionError):
    """The image may not be read: missing, outside the allowed roots, or of a refused kind."""


class ImageError(PerceptionError):
    """The file is not a raster that can be read: wrong format, truncated, refused driver, too large."""


class RegionError(PerceptionError):
    """The region is empty, reversed or outside the image."""


class InputError(PerceptionError):
    """A question, label list or number is empty, too long or out of range."""


class ServerUnavailable(PerceptionError):
    """No model server answers, or it went away in mid-call."""


class ServerBusy(PerceptionError):
    """The model server's queue is full; `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerError(PerceptionError):
    """The model server refused the request or failed on it."""


class NotServed(ServerError):
    """The loaded model has no part for this task; the message names the tasks that it serves."""


class DeadlinePassed(PerceptionError):
    """The time for one call is over; the message says what was found until then. The rest of the work is cancelled."""


class PairError(PerceptionError):
    """Two images cannot be compared: no overlap, different kinds of measurement, or only one has a place on Earth."""


class ArtifactError(PerceptionError):
    """A file for an answer is gone, unknown, too large to keep or could not be written."""

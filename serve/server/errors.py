"""What a request is refused with."""


class RequestError(Exception):
    """A request that is not served.

    Args:
      status: of HTTP.
      message: what is wrong, what was received, what to do.
      retry_after: seconds, for requests that may be sent again.
      feature: path of the feature whose id is bad.
    """

    def __init__(
        self, status: int, message: str, *, retry_after: int | None = None, feature: str | None = None
    ):
        super().__init__(message)
        self.status: int = status
        self.message: str = message
        self.retry_after: int | None = retry_after
        self.feature: str | None = feature


def bad_request(message: str) -> RequestError:
    """The request is not of the form it must be."""
    return RequestError(400, message)


def too_many_rows(rows: int, limit: int) -> RequestError:
    """There is never room for it."""
    return RequestError(413, f"a request must be of at most {limit} rows, got {rows}; send several requests.")


def out_of_memory() -> RequestError:
    """There was no memory for it."""
    return RequestError(503, "there is no memory for the request.", retry_after=1)


def overloaded(what: str) -> RequestError:
    """There is no room for it."""
    return RequestError(429, f"the server is overloaded: {what}; send the request again later.", retry_after=1)


def unavailable(why: str) -> RequestError:
    """Nothing is served at the moment."""
    return RequestError(503, f"the server takes no requests: {why}.", retry_after=1)


def expired(begun: bool) -> RequestError:
    """Its deadline is over.

    Args:
      begun: whether it runs already.
    """
    if begun:
        return RequestError(504, "the deadline of the request passed while it ran.")
    return RequestError(504, "the deadline of the request passed before it could run; it was not run.")


class OptionError(ValueError):
    """What is to be served does not fit the server, or its options; all there is to say is in the message."""

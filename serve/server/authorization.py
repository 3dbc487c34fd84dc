"""Who may switch versions."""

import hmac
import ipaddress

from starlette.requests import Request

from .errors import RequestError


def authorize(request: Request, token: str | None) -> None:
    """With a token, whoever has it; without, this machine, but no page of another site in its browser.

    Raises:
      RequestError: 401 or 403 for others.
    """
    if token is not None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RequestError(401, "Authorization must be 'Bearer TOKEN' with the admin token.")
        return
    host = request.client.host if request.client else ""
    origin = request.headers.get("origin")
    if not _is_loopback(host) or (origin and origin.split("//")[-1] != request.headers.get("host")):
        raise RequestError(403, "versions are switched from this machine only; set an admin token.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Who may switch versions."""

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request

from .errors import RequestError

#: Headers of proxies: whoever is behind one on this machine comes from a loopback address.
_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")


def authorize(request: Request, token: str | None) -> None:
    """With a token, whoever has it; without, this machine, but no page of another site in its browser.

    A proxy on this machine that adds no header, as nginx by default, is not seen: it must not forward `/admin/`.

    The names of other sites may lead here, too: a browser takes what they mean from whoever owns them. So the request must
    name this machine as localhost, or by a loopback address.

    Raises:
      RequestError: 401 or 403 for others.
    """
    if token is not None:
        # Headers are read as Latin-1, and variables of the environment as UTF-8 where they are that.
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {token}".encode(errors="surrogateescape")):
            raise RequestError(401, "Authorization must be 'Bearer TOKEN' with the admin token.")
        return
    client, host = request.client.host if request.client else "", request.headers.get("host", "")
    origin = request.headers.get("origin")
    forwarded = next((name for name in _FORWARDED if name in request.headers), None)
    if forwarded is not None:
        raise RequestError(
            403,
            f"versions are switched from this machine only, and {forwarded} says that a proxy sent this; set an admin token.",
        )
    if not _is_loopback(client) or not _names_loopback(host) or (origin and origin.split("//")[-1] != host):
        raise RequestError(
            403,
            "versions are switched from this machine only, at localhost or a loopback address, got Host "
            f"{host[:80]!r}; set an admin token.",
        )


def _names_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    # Who comes over IPv4 to a socket of IPv6; Python 3.13 sees it by itself.
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback

"""Who sends a request: the owner of its key."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from fluxfire.serve.errors import RefusedError
from fluxfire.serve.keys import Keys

_bearer = HTTPBearer(auto_error=False, description="An API key, if the service needs one.")
_header = APIKeyHeader(name="X-API-Key", auto_error=False)


async def key_owner(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    header: Annotated[str | None, Depends(_header)],
) -> str | None:
    """Return the name of the request's key; None if the service has no keys.

    Raises:
        RefusedError: the service has keys, and the request has none or a wrong one.
    """
    keys: Keys | None = request.app.state.keys
    if keys is None:
        return None
    key = bearer.credentials if bearer else header or ""
    name = keys.owner(key)
    if name is None and key:
        raise RefusedError("this key is unknown", status=401, code="key-unknown")
    if name is None:
        raise RefusedError(
            "this service needs a key: send it as Authorization: Bearer KEY, or X-API-Key",
            status=401,
            code="key-wanted",
        )
    return name


Owner = Annotated[str | None, Depends(key_owner)]

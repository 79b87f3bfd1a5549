"""Who asks: the hook for keys, and the scope that a route needs, declared beside the route."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from fastapi import Request

Scope = Literal["search", "write", "admin"]
Admit = Callable[[Request, Scope], Awaitable[str]]  # the tenant, or ApiError 401, 403, 429

TENANT = "default"


@dataclass(frozen=True)
class Needs:
    """A dependency of a route: the tenant of whoever asks, before anything of the body is read. Without a hook all are TENANT."""

    scope: Scope
    admit: Admit | None

    async def __call__(self, request: Request) -> str:
        return await self.admit(request, self.scope) if self.admit else TENANT

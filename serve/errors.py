"""What is raised where the service has no answer to give. Every one of them goes out in the same body, with its own status and code."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class ApiError(Exception):
    """An answer other than 200: status, a stable code, a sentence, and headers."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


class NotSupported(ApiError):
    """501: what answers behind the interface cannot do this at all."""

    def __init__(self, message: str) -> None:
        super().__init__(501, "not_supported", message)


class ReleaseNotServed(ApiError):
    """404: a release was asked for by name, and another one answers."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(404, "release_not_served", f"the release {asked[:100]!r} is not served; served is {served!r}")


class TenantUnknown(ApiError):
    """404: no catalogue of this tenant is served here."""

    def __init__(self, tenant: str) -> None:
        super().__init__(404, "tenant_unknown", f"there is no catalogue of the tenant {tenant[:100]!r} here")


class Unusable(ApiError):
    """422: well formed, but not for this catalogue: a filter on a column it lacks, an attribute of another type."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(422, code, message)


def invalid(message: str) -> ApiError:
    return ApiError(422, "invalid_request", message)


@contextmanager
def at(place: str) -> Iterator[None]:
    """Errors from within say where in the request they arose."""
    try:
        yield
    except ApiError as error:
        raise ApiError(error.status, error.code, f"{place}: {error}", error.headers) from error

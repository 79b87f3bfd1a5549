"""How much one caller may ask for: a token bucket for the pace, a count for the day. Arithmetic on a time that is given."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.intake import ApiError

DAY_S = 86_400
ROUNDING = 1e-6  # tokens: what seconds since 1970 in a double lose


class Allowance(BaseModel):
    """rate: requests a second, kept up for ever; burst: requests at once after a rest; daily: requests between midnights, UTC."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    rate: float = Field(default=10, gt=0, allow_inf_nan=False)
    burst: int = Field(default=20, ge=1)
    daily: int = Field(default=100_000, ge=1)


class TooMany(ApiError):
    """429: beyond the pace or the day's quota; Retry-After has the whole seconds after which a request can succeed."""

    def __init__(self, code: str, message: str, seconds: int) -> None:
        super().__init__(429, code, f"{message}; try again in {seconds} s", {"Retry-After": str(seconds)})


@dataclass(frozen=True)
class Wait:
    """Why not now, and after how many whole seconds a request can succeed, at least 1."""

    reason: Literal["rate", "quota"]
    seconds: int


class Meter:
    """What one caller has used: three numbers, whatever it asks. Not locked: use it from one thread."""

    __slots__ = ("at", "tokens", "used")

    def __init__(self, allowance: Allowance, now: float) -> None:
        self.at, self.tokens, self.used = now, float(allowance.burst), 0

    def spend(self, allowance: Allowance, now: float) -> Wait | None:
        """Take one request at `now` (seconds since 1970), or say how long to wait; what is refused takes nothing.

        A clock that is set back neither fills nor blocks the bucket, and a changed allowance holds at once.
        """
        if now // DAY_S != self.at // DAY_S:
            self.used = 0
        self.tokens = min(self.tokens + max(now - self.at, 0) * allowance.rate, allowance.burst)
        self.at = now
        if self.used >= allowance.daily:
            return Wait("quota", max(math.ceil(DAY_S - now % DAY_S), 1))
        if self.tokens < 1 - ROUNDING:
            return Wait("rate", max(math.ceil((1 - self.tokens) / allowance.rate - ROUNDING), 1))
        self.tokens, self.used = max(self.tokens - 1, 0), self.used + 1
        return None

    def take(self, name: str, allowance: Allowance, now: float) -> None:
        """Spend one request of the key `name`. TooMany with `rate_exceeded` or `quota_exceeded`."""
        wait = self.spend(allowance, now)
        if wait is None:
            return
        if wait.reason == "quota":
            raise TooMany("quota_exceeded", f"the key {name} has used its {allowance.daily:,} requests of today (UTC)", wait.seconds)
        said = f"the key {name} may send {allowance.rate:g} requests/s, {allowance.burst} at once"
        raise TooMany("rate_exceeded", said, wait.seconds)

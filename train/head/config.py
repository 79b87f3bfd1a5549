"""The settings of the prototype head."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from train.head.rows import Storage

REFRESH, AT = 200, 100_000  # steps between rebuilds, up to as many prototypes


class HeadConfig(BaseModel):
    """`neighbours`, `random` and `refresh` matter to the sparse form; `filter` is a cosine, 0 is off; `folder` is an existing one for
    rows in tier "file", "" the system's for temporary files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["full", "sparse"] = "full"
    neighbours: Annotated[int, Field(ge=1)] = 64  # nearest prototypes of each target that enter the denominator
    random: Annotated[int, Field(ge=0)] = 2048  # further prototypes drawn at random a step, over all workers
    refresh: Annotated[int, Field(ge=0)] = 0  # steps between rebuilds of the index over the prototypes; 0: see `rebuilt_every`
    storage: Storage = "device"
    folder: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    subcentres: Annotated[int, Field(ge=1, le=16)] = 1  # rows a prototype, the nearest counts (sub-centre ArcFace)
    filter: Annotated[float, Field(ge=0, le=1)] = 0.0  # other prototypes with a cosine above it take no part

    def rebuilt_every(self, rows: int) -> int:
        """Steps between rebuilds: in proportion to the prototypes, as the time of a rebuild is, so that its share of a step stays."""
        return self.refresh or max(REFRESH, REFRESH * rows // AT)

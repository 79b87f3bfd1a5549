"""The settings of the prototype head."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from train.head.rows import Storage


class HeadConfig(BaseModel):
    """`neighbours`, `random` and `refresh` matter to the sparse form; `filter` is a cosine, 0 is off."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["full", "sparse"] = "full"
    neighbours: Annotated[int, Field(ge=1)] = 64  # nearest prototypes of each target that enter the denominator
    random: Annotated[int, Field(ge=0)] = 2048  # further prototypes drawn at random a step, over all workers
    refresh: Annotated[int, Field(ge=1)] = 200  # steps between rebuilds of the index over the prototypes
    storage: Storage = "device"
    dtype: Literal["float32", "bfloat16"] = "float32"
    subcentres: Annotated[int, Field(ge=1, le=16)] = 1  # rows a prototype, the nearest counts (sub-centre ArcFace)
    filter: Annotated[float, Field(ge=0, le=1)] = 0.0  # other prototypes with a cosine above it take no part

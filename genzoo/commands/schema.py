"""What the plain values of a command's configuration must be; arguments of objects are checked by their own signatures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A mapping whose keys are all known."""

    model_config = ConfigDict(extra="forbid", strict=False)

    @classmethod
    def known_keys(cls, prefix: str = "") -> Iterator[str]:
        """List all keys with their sections, ``trainer.batch_size``."""
        for name, field in cls.model_fields.items():
            yield f"{prefix}{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from field.annotation.known_keys(f"{prefix}{name}.")


class Trainer(Section):
    accelerator: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "32-true", "bf16-mixed", "64-true"]
    threads: Positive | None
    batch_size: Positive
    clip: PositiveFloat | None
    ema: Annotated[float, Field(ge=0, lt=1)]
    grids: NonNegative
    saves: Positive
    learning_rate: dict[str, Any]


class Budget(Section):
    images: Positive | None
    seconds: PositiveFloat | None


class Data(Section):
    name: str
    kind: Literal["image", "plane"]
    shape: list[Positive]
    levels: Annotated[int, Field(ge=2)] | None
    num_classes: NonNegative | None
    flip: bool
    source: dict[str, Any]
    root: str | None = None
    size: Positive | None = None
    channels: Literal[1, 3] | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None


class Metrics(Section):
    n: Positive | None
    num_samples: Positive
    batch_size: Positive
    throughput: Positive


class Train(Section):
    trainer: Trainer
    optimizer: dict[str, Any]
    sampler: dict[str, Any] | None = None
    logger: dict[str, Any] | None = None
    metrics: Metrics
    budget: Budget
    model: dict[str, Any]
    data: Data
    experiment: str | None = None
    seed: Seed
    outputs: str


class Sample(Section):
    sampler: dict[str, Any] | None = None
    run: str
    n: Positive
    out: str
    seed: Seed
    y: NonNegative | None
    ema: bool
    batch_size: Positive
    device: Literal["auto", "cpu", "cuda"]
    trust: list[str]


class Evaluate(Section):
    sampler: dict[str, Any] | None = None
    metrics: Metrics
    run: str
    seed: Seed
    ema: bool
    device: Literal["auto", "cpu", "cuda"]
    trust: list[str]


SCHEMAS: dict[str, type[Section]] = {"train": Train, "sample": Sample, "evaluate": Evaluate}

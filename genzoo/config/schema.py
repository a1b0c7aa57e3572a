"""Schema of the configuration of each command; arguments of objects are checked by their signatures.

Generous upper limits prevent typing errors from exhausting the memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from genzoo.config.names import is_full_name


def _is_path(text: str) -> str:
    if "\0" in text or len(os.fsencode(text)) > 4095 or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise PydanticCustomError("path", "is not a valid file name")
    return text


def _is_full_name(text: str) -> str:
    if not is_full_name(text):
        raise PydanticCustomError("name", "must be the full name of a class, package.module.Class")
    return text


def _is_class(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value):
        return value
    if not isinstance(value, int):
        raise PydanticCustomError("class", "must be the name or the number of a class")
    if not 0 <= value < 2**63:
        raise PydanticCustomError("class", "must be at least 0")
    return value


def _are_classes(value: Any) -> Any:
    if isinstance(value, list):
        if any(item is None for item in value) or not 0 < len(value) <= 1000:
            raise PydanticCustomError("class", "must list 1 to 1000 names or numbers of classes")
        return [_is_class(item) for item in value]
    return _is_class(value)


def _names_a_class(node: dict[str, Any]) -> dict[str, Any]:
    if "_target_" not in node:
        raise PydanticCustomError("node", "has no class; set its _target_")
    return node


def _is_device(name: Any) -> Any:
    if str(name).partition(":")[0] == "mps":
        raise PydanticCustomError("device", "Apple GPUs are not supported; use cpu")
    return name


Device = Annotated[Literal["auto", "cpu", "cuda"], BeforeValidator(_is_device)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(gt=0, le=2**20)]
Side = Annotated[int, Field(gt=0, le=2**14)]
Samples = Annotated[int, Field(ge=0, le=2**24)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_is_path)]
Name = Annotated[str, AfterValidator(_is_full_name)]
Node = Annotated[dict[str, Any], AfterValidator(_names_a_class)]
Classes = Annotated[int | str | list[int | str] | None, PlainValidator(_are_classes)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A mapping without unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=False)

    @field_validator("*", mode="before")
    @classmethod
    def reject_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject bool for numeric fields."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("truth", "input should not be true or false")
        return value

    @classmethod
    def known_keys(cls, prefix: str = "") -> Iterator[str]:
        """List all full keys, such as ``trainer.batch_size``."""
        for name, field in cls.model_fields.items():
            yield f"{prefix}{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from field.annotation.known_keys(f"{prefix}{name}.")


class Trainer(Section):
    accelerator: Device
    devices: Annotated[int, Field(gt=0, le=1024)] = 1
    nodes: Annotated[int, Field(gt=0, le=1024)] = 1
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"]
    compile: bool = False
    deterministic: bool = False
    channels_last: bool = False
    threads: Annotated[int, Field(gt=0, le=1024)] | None
    batch_size: Count
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    clip: PositiveFloat | None
    ema_half_life: PositiveFloat | None
    grids: Annotated[int, Field(ge=0, le=1000)]
    saves: Annotated[int, Field(gt=0, le=1000)]
    save_seconds: PositiveFloat | None = None
    scores: Annotated[int, Field(ge=0, le=1000)]
    score_samples: Annotated[int, Field(gt=0, le=2**20)]
    learning_rate: Node


class Budget(Section):
    images: Positive | None
    seconds: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None
    flops: Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)] | None
    samples: Samples

    @model_validator(mode="after")
    def limits_something(self) -> Budget:
        if self.images is None and self.seconds is None and self.flops is None:
            raise ValueError("budget.images, budget.seconds and budget.flops are null: set one of them")
        return self


def _is_printable(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("printable", "contains unprintable characters")
    return text


Text = Annotated[str, Field(max_length=1000), AfterValidator(_is_printable)]
Caption = Annotated[str, Field(min_length=1, max_length=2**16)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e40, allow_inf_nan=False)]


class Machine(Section):
    """The machine of a run, in its status."""

    model_config = ConfigDict(extra="allow", strict=True)

    system: Text | None = None
    cpu: Text | None = None
    cores: Count | None = None


class Extends(Section):
    """The finished run that a run goes on with, and from which step, in its status."""

    run: Text
    step: NonNegative


class Status(Section):
    """The keys of ``status.json`` that resuming reads; other keys are arbitrary."""

    model_config = ConfigDict(extra="allow", strict=True)

    state: Literal["running", "failed", "done"] | None = None
    model: Annotated[str, Field(pattern=r"^[^/\x00-\x1f]{1,100}$")] | None = None
    job: Text | None = None
    device: Text | None = None
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    data_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    tokenizer_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    versions: dict[Text, Text | None] | None = None
    machine: Machine | None = None
    gpu: dict[Text, Text | int | None] | None = None
    extends: Extends | None = None
    resumed: Annotated[list[dict[str, Any]], Field(max_length=10_000)] | None = None
    step: NonNegative | None = None
    images: NonNegative | None = None
    planned_images: NonNegative | None = None
    train_seconds: NonNegativeFloat | None = None
    train_flops: NonNegativeFloat | None = None


class Data(Section):
    name: Annotated[str, Field(pattern=r"^[^/\x00-\x1f]{1,100}$")]
    kind: Literal["image", "plane"]
    shape: Annotated[list[Side], Field(min_length=1, max_length=3)]
    levels: Annotated[int, Field(ge=2, le=2**16)] | None
    num_classes: Annotated[int, Field(ge=0, le=2**20)] | None
    flip: bool
    conditional: bool = False
    source: Node
    root: Place | None = None
    test_root: Place | None = None
    size: Side | None = None
    channels: Literal[1, 3] | None = None
    test_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0  # runs of earlier releases have no validation split
    captions: Literal["auto", "required", "none"] | None = None
    font: Place | None = None
    vocabulary: Annotated[int, Field(ge=258, le=2**16)] | None = None
    text_length: Annotated[int, Field(ge=2, le=2**10)] | None = None
    n: Annotated[int, Field(gt=0, le=2**20)] | None = None
    n_test: Annotated[int, Field(gt=0, le=2**20)] | None = None
    seed: Seed | None = None
    two: Annotated[float, Field(ge=0, le=1)] | None = None
    held_out: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def is_of_its_kind(self) -> Data:
        kind = "plane" if self.levels is None else "image"
        if len(self.shape) != (3 if kind == "image" else 1):
            raise ValueError(f"data.shape={self.shape}: images are [channels, height, width], vectors [d]")
        if kind == "image" and self.shape[0] not in (1, 3):
            raise ValueError(f"data.shape={self.shape}: images have 1 channel (grey) or 3 (colour)")
        if self.kind != kind:
            raise ValueError(f"kind={self.kind}: data={self.name} is of kind {kind}, which is set by the data; omit it")
        return self


class Metrics(Section):
    split: Literal["test", "validation"] = "test"
    n: Samples | None  # see also genzoo.metrics.sample_size.check_sample_size
    events: Positive | None
    num_samples: Count | None
    batch_size: Count
    throughput: Annotated[int, Field(gt=0, le=2**16)]
    max_nfe: Annotated[int, Field(gt=0)] | Literal["training"] | None = 50
    features: Annotated[str, Field(min_length=1)] | None
    force: bool
    inception_weights: Place | None
    dinov2_weights: Place | None


class Train(Section):
    trainer: Trainer
    optimizer: Node
    sampler: Node | None = None
    codec: Node | None = None
    prior: Node | None = None
    encoder: Node | None = None
    teacher: Node | None = None
    logger: Node | None = None
    budget: Budget  # validated before the metrics, whose number of samples it sets
    metrics: Metrics
    model: Node
    data: Data
    experiment: str | None = None
    seed: Seed
    outputs: Place
    resume: Place | None = None
    init: Place | None = None
    trust: list[str] = []
    timeout: PositiveFloat | None = None
    objective: str | None = None

    @model_validator(mode="after")
    def fits_together(self) -> Train:
        family = str(self.model.get("_target_")).rpartition(".")[2]
        for part in ("codec", "prior", "encoder", "teacher"):
            if getattr(self, part) and part not in self.model:
                raise ValueError(f"{part}: {family} has no {part}; omit it")
        if self.metrics.n is None or self.metrics.num_samples is None:
            raise ValueError("metrics.n=null, metrics.num_samples=null: must be numbers; null is for evaluate")
        if self.metrics.max_nfe == "training":
            raise ValueError(
                "metrics.max_nfe=training: must be a number, or null for no limit; training is for evaluate"
            )
        nodes = [self.model, *(self.model.get(part) for part in ("prior", "base", "upsampler", "decoder"))]
        if self.sampler and not any("sampler" in node for node in nodes if isinstance(node, dict)):
            raise ValueError(f"sampler: {family} samples in one pass and takes no sampler; omit it")
        return self


Augmentation = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None
Scale = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None


class Sample(Section):
    sampler: Node | None = None
    guidance: Node | None = None
    augmentation: Augmentation = None
    prior_guidance: Scale = None
    run: Place
    n: Annotated[int, Field(gt=0, le=2**24)] | None
    out: Place
    seed: Seed
    label: Classes
    text: Caption | None = None
    texts: Place | None = None
    candidates: Annotated[int, Field(gt=0, le=2**16)] = 1
    ranker: Place | None = None
    ema: bool
    batch_size: Count
    precision: Literal["32-true", "bf16-mixed"]
    compile: bool
    device: Device
    trust: list[Name]


class Evaluate(Section):
    sampler: Node | None = None
    guidance: Node | None = None
    augmentation: Augmentation = None
    prior_guidance: Scale = None
    candidates: Annotated[int, Field(gt=0, le=2**16)] = 1
    ranker: Place | None = None
    metrics: Metrics
    run: Place | None
    samples: Place | None
    out: Place | None
    data: Data | None = None
    seed: Seed
    ema: bool
    device: Device
    trust: list[Name]
    # Training settings of the kind of data, ignored here.
    budget: dict[str, Any] | None = None
    trainer: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_default_kind(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in given.items() if key != "data" or value != {"kind": "image"}}

    @model_validator(mode="after")
    def has_one_subject(self) -> Evaluate:
        if (self.run is None) == (self.samples is None):
            raise ValueError("run: set either run=DIR, or samples=FOLDER|FILE.npz with data=...")
        if self.samples is not None:
            if self.data is None:
                raise ValueError("data is missing: set data=..., the reference of the samples")
            for part in ("sampler", "guidance", "augmentation", "prior_guidance"):
                if getattr(self, part) is not None:
                    raise ValueError(f"{part}: the samples are already drawn; omit it")
        elif self.data is not None or self.out is not None:
            raise ValueError("data and out belong to samples=...; a run has its own data")
        return self


class Compare(Section):
    runs: Annotated[list[Place], Field(min_length=1)] | None
    out: Place
    title: str | None
    workspace: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None
    logger: Node | None = None

    @model_validator(mode="before")
    @classmethod
    def accept_one_folder(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "runs": [given["runs"]]} if isinstance(given.get("runs"), str) else given

    @model_validator(mode="after")
    def has_task(self) -> Compare:
        if self.runs is None and self.workspace is None:
            raise ValueError("runs is missing: set runs=outputs, or any folders of runs")
        if self.logger and self.logger.get("_target_") != "genzoo.training.loggers.WandB":
            raise ValueError("logger: a comparison supports logger=wandb alone; omit it")
        return self


class Serve(Section):
    runs: Annotated[list[Place], Field(min_length=1)]
    port: Annotated[int, Field(ge=1024, le=65535)]
    device: Device
    trust: list[Name]

    @model_validator(mode="before")
    @classmethod
    def accept_one_folder(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "runs": [given["runs"]]} if isinstance(given.get("runs"), str) else given


class OnRun(Section):
    """Keys of all commands on the latents and samples of a run."""

    run: Place
    out: Place
    ema: bool
    batch_size: Count
    device: Device
    trust: list[Name]


Animated = Annotated[int, Field(ge=2, le=1000)]  # points or frames


class Encode(OnRun):
    examples: Place
    n: Annotated[int, Field(gt=0, le=2**24)] | None
    seed: Seed
    label: Classes


class Compress(Encode):
    pass


class Decompress(Section):
    file: Place
    run: Place | None
    runs: Annotated[list[Place], Field(min_length=1)]
    out: Place
    ema: bool
    device: Device
    trust: list[Name]

    @model_validator(mode="before")
    @classmethod
    def accept_one_folder(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "runs": [given["runs"]]} if isinstance(given.get("runs"), str) else given


class Decode(OnRun):
    latents: Place
    label: Classes
    text: Caption | None = None


class Reconstruct(OnRun):
    examples: Place
    n: Annotated[int, Field(gt=0, le=2**16)]
    seed: Seed
    label: Classes


class Interpolate(OnRun):
    examples: Place | None
    n: Annotated[int, Field(gt=0, le=2**12)]
    steps: Animated | None
    seed: Seed
    label: Classes


class Traverse(OnRun):
    examples: Place | None
    dimensions: Annotated[list[NonNegative], Field(min_length=1, max_length=1000)] | None
    steps: Animated | None
    reach: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    seed: Seed
    label: Classes


class Attribute(OnRun):
    plus: Annotated[int | str, PlainValidator(_is_class)]
    minus: Annotated[int | str, PlainValidator(_is_class)]
    strengths: Annotated[
        list[Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]], Field(min_length=1, max_length=1000)
    ]
    images: Annotated[int, Field(gt=0, le=2**24)]
    n: Annotated[int, Field(gt=0, le=2**12)]
    seed: Seed


class Trajectory(OnRun):
    sampler: Node | None = None
    guidance: Node | None = None
    n: Annotated[int, Field(gt=0, le=2**16)] | None
    frames: Animated | None
    show: Literal["state", "estimate"]
    seed: Seed
    label: Classes
    text: Caption | None = None
    texts: Place | None = None


class Vary(OnRun):
    sampler: Node | None = None
    guidance: Node | None = None
    image: Place
    to: Place | None
    from_text: Caption | None
    text: Caption | None
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    n: Annotated[int, Field(gt=0, le=2**12)] | None
    steps: Animated | None
    invert: bool
    seed: Seed

    @model_validator(mode="after")
    def has_one_end(self) -> Vary:
        if (self.from_text is None) != (self.text is None):
            missing = "from_text" if self.from_text is None else "text"
            raise ValueError(f"{missing} is missing: a change is from a text to another, from_text=... text=...")
        if self.text is not None and self.to is not None:
            raise ValueError("to, text: set only one of them")
        return self


class Edit(Section):
    task: Node
    method: Node | None = None
    sampler: Node | None = None
    guidance: Node | None = None
    run: Place
    image: Place | None
    split: Literal["test"] | None
    images: Positive | None
    mask: Place | None
    n: Annotated[int, Field(gt=0, le=2**16)]
    out: Place
    seed: Seed
    label: Annotated[int | str | None, PlainValidator(_is_class)]
    text: Caption | None = None
    ema: bool
    batch_size: Count
    device: Device
    trust: list[Name]

    @model_validator(mode="after")
    def has_one_subject(self) -> Edit:
        if (self.image is None) == (self.split is None):
            raise ValueError("image: set either image=FILE|FOLDER, or split=test")
        sigma = self.task.get("sigma", 0.0)
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 <= sigma <= 1000:
            raise ValueError(f"task.sigma={sigma}: must be a number from 0 to 1000, the noise on [-1, 1]")
        return self


SECTIONS: dict[str, type[Section]] = {"data": Data, "metrics": Metrics, "status": Status}
SCHEMAS: dict[str, type[Section]] = {
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
    "compare": Compare,
    "serve": Serve,
    "edit": Edit,
    "compress": Compress,
    "decompress": Decompress,
    "encode": Encode,
    "decode": Decode,
    "reconstruct": Reconstruct,
    "interpolate": Interpolate,
    "traverse": Traverse,
    "attribute": Attribute,
    "trajectory": Trajectory,
    "vary": Vary,
}

"""Tasks of editing: operators by configuration, masks, and pictures as observations on [-1, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genzoo.config.instantiate import build
from genzoo.data.arrays import read_array
from genzoo.data.decoding import SUFFIXES
from genzoo.data.pictures import read_picture, read_samples
from genzoo.diffusion.inverse import Identity, Inpainting, LinearOperator
from genzoo.errors import UsageError
from genzoo.event import EventSpec

REGIONS = ("top", "bottom", "left", "right", "center")
ARRAYS = (".npz", ".npy")


def build_task(node: Mapping[str, Any], event: EventSpec, mask: Tensor | None) -> tuple[LinearOperator, float]:
    """Build the operator and the noise level of a task.

    Args:
        node: configuration of the operator, with its ``sigma``.
        event: of the model.
        mask: unknown coordinates, bool (*shape), for inpainting.

    Raises:
        UsageError: for a task that does not fit the event, and a mask that is missing, or given to another task.
    """
    arguments = {key: value for key, value in node.items() if key != "sigma"}
    inpaints = str(arguments["_target_"]).rpartition(".")[2] == Inpainting.__name__
    if inpaints and mask is None:
        raise UsageError(f"mask is missing: set mask=FILE, white where unknown, or one of {', '.join(REGIONS)}")
    if mask is not None and not inpaints:
        raise UsageError("mask: belongs to task=inpaint; omit it")
    unknown: dict[str, Any] = {"unknown": mask} if inpaints else {}
    operator = build(arguments, "task", event_shape=event.shape, **unknown)
    if not isinstance(operator, LinearOperator):
        raise UsageError(f"task._target_={arguments['_target_']}: is not a LinearOperator")
    sigma = float(node["sigma"])
    if isinstance(operator, Identity) and sigma == 0:
        raise UsageError("task.sigma=0: an image without noise needs no denoising; set task.sigma=0.2, on [-1, 1]")
    return operator, sigma


def read_mask(mask: str, event: EventSpec) -> Tensor:
    """Read the unknown coordinates, bool (*shape) or (1, H, W).

    Args:
        mask: a region of ``REGIONS``; a picture of the size of the image, white where unknown; or an .npz or .npy of the shape
            of the event, or (H, W), non-zero where unknown.
        event: of the model.

    Raises:
        UsageError: for a region of vectors, and a mask of another size.
    """
    if mask in REGIONS:
        return region(mask, event)
    path = Path(mask)
    if path.is_dir() or not path.exists():
        raise UsageError(
            f"mask={mask}: is {'a folder' if path.is_dir() else 'no file'}, nor one of {', '.join(REGIONS)}"
        )
    if path.suffix in ARRAYS:
        array = read_array(path, ("mask", "arr_0"))
        plane = event.is_image and array.shape == event.shape[1:]
        if array.dtype.kind not in "biuf" or not (plane or array.shape == event.shape):
            raise UsageError(f"mask={mask}: holds {array.dtype} {array.shape}, not numbers of shape {event.shape}")
        marked = torch.from_numpy(array != 0)
        return marked[None] if plane else marked
    if not event.is_image:
        raise UsageError(f"mask={mask}: vectors need an .npz or .npy of {event.shape[0]} numbers")
    return read_picture(path, (1, *event.shape[1:]), "mask") > 127


def region(name: str, event: EventSpec) -> Tensor:
    """Mask one half of an image, or the box of half its sides in the middle: bool (1, H, W)."""
    if not event.is_image:
        raise UsageError(f"mask={name}: vectors need an .npz or .npy of {event.shape[0]} numbers")
    _, H, W = event.shape
    i, j = torch.arange(H)[:, None], torch.arange(W)
    inside = {
        "top": (i < H // 2) & (j >= 0),
        "bottom": (i >= H // 2) & (j >= 0),
        "left": (i >= 0) & (j < W // 2),
        "right": (i >= 0) & (j >= W // 2),
        "center": (i >= H // 4) & (i < H - H // 4) & (j >= W // 4) & (j < W - W // 4),
    }
    return inside[name][None]


def read_observation(path: Path, operator: LinearOperator, event: EventSpec) -> tuple[Tensor, Tensor | None]:
    """Read observations: one picture, or the rows of an .npz or .npy.

    Args:
        path: the file; for inpainting of the size of an event, whose unknown pixels are ignored.
        operator, event: of the task and the model.

    Returns:
        The values, (B, *operator.shape), and for images the bytes of the file, uint8 (B, ...).

    Raises:
        UsageError: for a missing file, and one of another kind or size.
    """
    shape = event.shape if isinstance(operator, Inpainting) else operator.shape
    if not path.is_file():
        raise UsageError(f"image={path}: there is no such file or folder")
    if path.suffix in ARRAYS:
        stored = read_samples(path, shape, event.levels)
    elif not event.is_image:
        raise UsageError(f"image={path}: vectors come in an .npz or .npy, floats (N, {event.shape[0]})")
    elif path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"image={path}: must be a picture ({', '.join(SUFFIXES[:4])}, ...), an .npz or a folder")
    else:
        stored = read_picture(path, shape, "image")[None]
    if event.levels is None:
        x, kept = stored, None
    else:
        x, kept = from_bytes(stored, event.levels), stored
    return (operator(x) if isinstance(operator, Inpainting) else x), kept


def from_bytes(image: Tensor, levels: int) -> Tensor:
    """Map bytes to [-1, 1], the inverse of ``to_bytes`` on bin centers and affine between them, float32."""
    return ((image.double() * ((levels - 1) / 255) + 0.5) * (2 / levels) - 1).float()


def to_levels(image: Tensor, levels: int) -> Tensor:
    """Round bytes to the nearest of K levels, int64."""
    return (image.double() * ((levels - 1) / 255)).round().long()

"""Checkpoints: safetensors for weights, plain tensors for state, and a checksum for every byte.

    checkpoints/step-<n>/weights.safetensors   the model as it was trained
                         ema.safetensors       the average of its weights; what samples and scores use
                         state.pt              step, plan, optimisers, counts of the averages
                         manifest.json         schema, and size and SHA-256 of the others
    stable/step-<n>/                           likewise, from before the decay of the learning rate; a longer run goes on here
    parents/             <key>.safetensors     the weights of each finished model that training builds on, such as model.teacher
                         manifest.json         likewise
    precomputed/         <part>.safetensors    what losses read and was computed before the first step
                         manifest.json         likewise

A checkpoint is written beside its place, forced onto the disk and renamed, and renamed again before it is deleted, so that
a directory called ``step-<n>`` is whole at every moment. Neither safetensors nor torch notices a flipped bit: every file is
checked against the manifest before it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from genzoo.runs import SCHEMA, Run, RunError, read_file, read_json, storing, sync
from genzoo.training.state_checks import check_weights, upgraded_weights

STABLE = "stable"  # folder of a run
_NAME = re.compile(r"step-(\d+)")
# What torch's and safetensors' readers raise for files that are damaged or made up.
NO_TENSORS = (
    *(RuntimeError, SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, LookupError, ValueError),
    *(TypeError, AttributeError, AssertionError, ArithmeticError, MemoryError, struct.error),
)
_ASIDE = ".step-"  # what folders are called that are on their way in or out


class Contents(NamedTuple):
    """What a checkpoint holds, on the CPU."""

    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    state: dict[str, Any]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}


def _bytes(model: nn.Module) -> bytes:
    return save_safetensors(_weights(model))


def _write(path: Path, data: bytes) -> dict[str, Any]:
    with storing(path, len(data)), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def save(folder: Path, step: int, model: nn.Module, ema: nn.Module, state: dict[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint in one rename and drop all but the newest ``keep``.

    Args:
        folder: ``checkpoints/`` of a run.
        step: optimiser steps so far.
        model, ema: the trained weights and their average.
        state: what else is needed to go on; plain types and tensors.
        keep: how many checkpoints stay.

    Raises:
        ResourceError: where the disk is full; the older checkpoints are untouched.
    """
    folder.mkdir(exist_ok=True)
    target = folder / f"step-{step}"

    def state_bytes() -> bytes:
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    files: dict[str, Callable[[], bytes]] = {
        "weights.safetensors": partial(_bytes, model),
        "ema.safetensors": partial(_bytes, ema),
        "state.pt": state_bytes,
    }
    write_folder(target, files, step=step)
    for old in find(folder)[:-keep]:
        remove(old)
    return target


def write_folder(target: Path, contents: Mapping[str, Callable[[], bytes]], **facts: Any) -> None:
    """Write files and their manifest as a folder that appears, or is replaced, in one rename.

    Args:
        target: the folder.
        contents: makes the bytes of each file, when it is its turn.
        facts: further entries of the manifest.

    Raises:
        ResourceError: where the disk is full; a folder that was there is untouched.
    """
    folder = target.parent
    with storing(folder):
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=_ASIDE))
    try:
        files = {name: _write(temporary / name, content()) for name, content in contents.items()}
        manifest = {"schema": SCHEMA, **facts, "files": files}
        _write(temporary / "manifest.json", json.dumps(manifest, indent=2).encode())
        os.chmod(temporary, 0o755)  # noqa: S103  mkdtemp lets nobody else in
        sync(temporary)
        if os.path.lexists(target):
            remove(target)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, which has another name before its first file is gone."""
    if checkpoint.is_symlink() or not checkpoint.is_dir():  # a file or a link in the place of one
        checkpoint.unlink()
        return
    aside = Path(tempfile.mkdtemp(dir=checkpoint.parent, prefix=_ASIDE))
    os.replace(checkpoint, aside)
    shutil.rmtree(aside)


def clean(folder: Path) -> None:
    """Remove what a process that was killed has left half written or half deleted; nobody may be saving."""
    for left in folder.glob(f"{_ASIDE}*"):
        remove(left)


def find(folder: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    steps = [(int(m.group(1)), path) for path in folder.glob("step-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(steps)]


def latest(run: Path) -> Path:
    """Return the newest checkpoint of a run directory.

    Raises:
        RunError: where there is none.
    """
    found = find(run / "checkpoints")
    if not found:
        done = False
        with contextlib.suppress(RunError):
            done = Run(run).status.get("state") == "done"
        why = (
            "its weights were not kept, only the record of a finished run" if done else "the run has not saved one yet"
        )
        raise RunError(f"run={run}: no checkpoint: {why}")
    return found[-1]


def read(checkpoint: Path, name: str, limit: int = 2**40) -> bytes:
    """Read one file of a checkpoint, checked against the manifest.

    Args:
        checkpoint: its directory.
        name: of the file.
        limit: bytes that it may have at most, whatever the manifest says.

    Raises:
        RunError: naming the file and what is wrong with it.
    """
    path, listing = checkpoint / name, checkpoint / "manifest.json"
    if checkpoint.is_symlink():
        raise RunError(f"{checkpoint}: is a link, of which a run has none")
    if not checkpoint.is_dir():
        raise RunError(f"{checkpoint}: is no folder, which a checkpoint is")
    try:
        manifest = read_json(listing)
        schema, size, sha256 = manifest["schema"], manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]
        if not (type(schema) is type(size) is int and isinstance(sha256, str)):
            raise TypeError("schema and bytes must be integers, sha256 a text")
    except (RunError, LookupError, TypeError) as error:
        why = str(error).removeprefix(f"{listing}: ")
        raise RunError(f"{listing}: missing or broken: {why}") from error
    if schema > SCHEMA:
        raise RunError(f"{checkpoint}: written by a newer genzoo (schema {schema}; this one knows {SCHEMA})")
    if size > limit:
        raise RunError(f"{path}: does not fit the model of config.yaml: it has {size:,} bytes, not {limit:,} or fewer")
    data = read_file(path, size)
    if len(data) != size:
        raise RunError(f"{path}: has {len(data):,} bytes, not the {size:,} of the manifest; the file is damaged")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RunError(f"{path}: its SHA-256 is not the manifest's, the file is damaged")
    return data


def load_weights(checkpoint: Path, model: nn.Module, *, ema: bool = True) -> None:
    """Fill a model with the averaged weights of a checkpoint, or with those that were trained.

    Raises:
        RunError: where a file is damaged or belongs to another model.
    """
    load_file(checkpoint, "ema.safetensors" if ema else "weights.safetensors", model)


def load_file(folder: Path, name: str, model: nn.Module) -> None:
    """Fill a model with the weights in one file of a folder that has a manifest.

    Raises:
        RunError: where the file is missing or damaged, or belongs to another model.
    """
    own = model.state_dict()
    # Twice, for weights in double precision; and the names, which safetensors writes before them.
    limit = 2 * sum(tensor.nbytes for tensor in own.values()) + 2**10 * len(own) + 2**16
    try:
        weights = upgraded_weights(load_safetensors(read(folder, name, limit)), own)
        check_weights(weights, own)
        model.load_state_dict(weights)
    except (RuntimeError, LookupError, ValueError, SafetensorError) as error:
        if isinstance(error, RunError):
            raise
        detail = " ".join(str(error).split())
        raise RunError(f"{folder / name}: does not fit the model of config.yaml: {detail[:200]}") from error


def keep_models(folder: Path, models: Mapping[str, nn.Module]) -> None:
    """Write the weights of finished models, by name, into a folder that has a manifest."""
    write_folder(folder, {f"{name}.safetensors": partial(_bytes, model) for name, model in models.items()})


def keep_tensors(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write named tensors, a file for each of some groups of them, into a folder that has a manifest."""
    plain = {name: {key: value.cpu().contiguous() for key, value in own.items()} for name, own in tensors.items()}
    write_folder(folder, {f"{name}.safetensors": partial(save_safetensors, own) for name, own in plain.items()})


def load_tensors(folder: Path, name: str, limit: int = 2**40) -> dict[str, Tensor]:
    """Read a group of tensors that ``keep_tensors`` wrote.

    Raises:
        RunError: where the file is missing or damaged.
    """
    try:
        return load_safetensors(read(folder, f"{name}.safetensors", limit))
    except SafetensorError as error:
        raise RunError(f"{folder / name}.safetensors: no file of tensors: {' '.join(str(error).split())}") from error


def load(checkpoint: Path, limit: int = 2**40) -> Contents:
    """Read a whole checkpoint, checked against its manifest.

    Args:
        checkpoint: its directory.
        limit: bytes that each of its files may have.

    Raises:
        RunError: naming the file and what is wrong with it.
    """
    name = "state.pt"
    try:
        content = read(checkpoint, name, limit)
        _check_stored(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        weights = []
        for name in ("weights.safetensors", "ema.safetensors"):
            weights.append(load_safetensors(read(checkpoint, name, limit)))
    except NO_TENSORS as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{checkpoint / name}: no file of tensors: {' '.join(str(error).split())[:200]}") from error
    return Contents(weights[0], weights[1], state)


def _check_stored(content: bytes) -> None:
    """Refuse a file of torch's that is no archive of uncompressed records, as torch writes them: it could unpack to any size.

    Raises:
        ValueError, BadZipFile: saying what it is.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > len(content) for member in members):
        raise ValueError("its records are compressed")


def latest_valid(
    folder: Path, complain: Callable[[str], None], *, limit: int = 2**40, remove_damaged: bool = True
) -> tuple[Path, Contents] | None:
    """Read the newest checkpoint that is not damaged.

    Args:
        folder: ``checkpoints/`` of a run.
        complain: is told what is wrong with each that is passed over.
        limit: bytes that each of its files may have.
        remove_damaged: whether these are removed.

    Returns:
        The checkpoint and what it holds; None where nothing was ever saved.

    Raises:
        RunError: where all are damaged.
    """
    damaged: list[Path] = []
    for checkpoint in reversed(find(folder)):
        try:
            contents = load(checkpoint, limit)
        except RunError as error:
            complain(str(error))
            damaged.append(checkpoint)
            continue
        for path in damaged if remove_damaged else ():
            remove(path)
        return checkpoint, contents
    if damaged:
        raise RunError(f"{folder}: no checkpoint in it is whole")
    return None

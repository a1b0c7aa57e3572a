"""Checkpoints come back bit for bit or not at all: damage, cuts and strangers' weights are refused in one line."""

from __future__ import annotations

import copy
import functools
import json
import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genzoo.runs import RunError
from genzoo.training import checkpoints
from genzoo.training.ema import EMA

FILES = ("weights.safetensors", "ema.safetensors", "state.pt")


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 2)).eval()


def averaged(model: nn.Module) -> nn.Module:
    ema = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter += 1
    return ema


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def saved(folder: Path, step: int = 10) -> tuple[Path, nn.Module, nn.Module]:
    model = network()
    ema = averaged(model)
    return checkpoints.save(folder, step, model, ema, {"steps": step, "tensor": torch.arange(3)}), model, ema


def refusal(checkpoint: Path, model: nn.Module, ema: bool) -> str:
    """Load weights, which must be refused; return the line that says why."""
    with pytest.raises(RunError) as caught:
        checkpoints.load_weights(checkpoint, model, ema=ema)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_come_back_bit_for_bit(folder):
    checkpoint, model, ema = saved(folder)
    assert checkpoint.name == "step-10" and sorted(p.name for p in checkpoint.iterdir()) == sorted(
        [*FILES, "manifest.json"]
    )
    for source, use_ema in ((model, False), (ema, True)):
        other = network()
        assert not same(other, source)
        checkpoints.load_weights(checkpoint, other, ema=use_ema)
        assert same(other, source)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_type_of_number_comes_back(folder, dtype):
    model = network().to(dtype)
    checkpoint = checkpoints.save(folder, 1, model, model, {})
    other = network().to(dtype)
    checkpoints.load_weights(checkpoint, other)
    assert same(other, model)


def test_the_state_comes_back_without_running_code(folder):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    checkpoint = checkpoints.save(folder, 3, model, model, {"steps": 3, "optimizers": [optimizer.state_dict()]})
    checkpoints.read(checkpoint, "state.pt")
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert state["steps"] == 3
    other = torch.optim.Adam(model.parameters(), lr=0.5)
    other.load_state_dict(state["optimizers"][0])

    def moments(adam: torch.optim.Adam) -> list[Tensor]:
        return [value for s in adam.state.values() for value in s.values()]

    assert other.param_groups[0]["lr"] == 0.1
    assert all(torch.equal(a, b) for a, b in zip(moments(other), moments(optimizer), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed_and_its_file_named(folder, name):
    checkpoint, model, _ = saved(folder)
    path, rng = checkpoint / name, random.Random(name)
    whole = path.read_bytes()
    places = {0, 7, 8, len(whole) - 1} | {rng.randrange(len(whole)) for _ in range(20)}
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        if name == "state.pt":
            with pytest.raises(RunError, match=r"state\.pt: its SHA-256 is not the manifest's"):
                checkpoints.read(checkpoint, name)
        else:
            before = copy.deepcopy(model)
            message = refusal(checkpoint, model, ema=name.startswith("ema"))
            assert message.startswith(f"{path}: its SHA-256 is not the manifest's"), message
            assert same(model, before), "a refused file left something behind"
    path.write_bytes(whole)
    assert checkpoints.read(checkpoint, name) == whole


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_file_cut_short_or_grown_is_refused(folder, name, length):
    checkpoint, _, _ = saved(folder)
    path = checkpoint / name
    whole = path.read_bytes()
    for broken in (whole[:length], whole + b"\0"):
        path.write_bytes(broken)
        with pytest.raises(RunError, match=name.replace(".", r"\.")):
            checkpoints.read(checkpoint, name)


def test_a_flipped_bit_of_the_manifest_is_refused_or_changes_nothing(folder):
    checkpoint, _, ema = saved(folder)
    path, rng = checkpoint / "manifest.json", random.Random(0)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        broken = bytearray(whole)
        broken[place] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        other = network()
        try:
            checkpoints.load_weights(checkpoint, other)
        except RunError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert same(other, ema)
    assert refused > 50


@pytest.mark.parametrize("manifest", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": "x", "files": {}}', "\xff"])
def test_a_broken_manifest_is_refused_by_name(folder, manifest):
    checkpoint, model, _ = saved(folder)
    (checkpoint / "manifest.json").write_bytes(manifest.encode("latin-1"))
    assert refusal(checkpoint, model, ema=True).startswith(f"{checkpoint / 'manifest.json'}: missing or broken")


@pytest.mark.parametrize("schema", ["x", None, [1]])
def test_a_schema_that_is_no_number_is_refused(folder, schema):
    checkpoint, model, _ = saved(folder)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "schema": schema}))
    assert refusal(checkpoint, model, ema=True).startswith(f"{checkpoint / 'manifest.json'}: missing or broken")


def test_a_newer_schema_is_refused_and_says_so(folder):
    checkpoint, model, _ = saved(folder)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    assert "written by a newer genzoo (schema 99; this one knows" in refusal(checkpoint, model, ema=True)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_refused_by_name(folder, name):
    checkpoint, _, _ = saved(folder)
    (checkpoint / name).unlink()
    with pytest.raises(RunError, match=name.replace(".", r"\.")):
        checkpoints.read(checkpoint, name if name in FILES else FILES[0])


@pytest.mark.parametrize(
    "stranger",
    [network(5), nn.Linear(2, 4), nn.Sequential(nn.Linear(2, 4)), nn.Sequential(*network(), nn.Linear(2, 2))],
)
@pytest.mark.parametrize("ema", [False, True])
def test_weights_of_another_model_are_refused_in_one_line(folder, stranger, ema):
    checkpoint, _, _ = saved(folder)
    message = refusal(checkpoint, stranger, ema)
    assert "does not fit the model of config.yaml" in message and len(message) < 500


# What is on the disk, whenever a save is cut short


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
@pytest.mark.parametrize("place", [*range(4), "state", "rename"])
def test_a_save_that_is_cut_short_leaves_the_older_checkpoints_and_nothing_else(folder, monkeypatch, place, error):
    _, _, ema = saved(folder, 10)
    calls = []

    def cut(original, at, *arguments, **keywords):
        calls.append(original)
        if len(calls) > at:
            raise error
        return original(*arguments, **keywords)

    owner, name, at = {"state": (torch, "save", 0), "rename": (checkpoints.os, "replace", 0)}.get(
        place, (checkpoints, "_write", place)
    )
    monkeypatch.setattr(owner, name, functools.partial(cut, getattr(owner, name), at))
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        checkpoints.save(folder, 20, network(), network(), {})
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir()] == ["step-10"]
    other = network()
    checkpoints.load_weights(checkpoints.latest(folder.parent), other)
    assert same(other, ema)


def test_every_file_and_both_folders_are_on_the_disk_before_anything_relies_on_them(folder, monkeypatch):
    """A loss of power cannot be tried here: what is tried is that nothing is renamed, or deleted, before all is forced out."""
    saved(folder, 10)
    order: list[str] = []

    def noted(name, original, shown):
        def call(*arguments):
            order.append(f"{name} {shown(*arguments)}")
            return original(*arguments)

        return call

    def of(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.removeprefix(".")[:5]

    monkeypatch.setattr(os, "fsync", noted("sync", os.fsync, of))
    monkeypatch.setattr(os, "replace", noted("rename", os.replace, lambda a, b: Path(b).name))
    checkpoints.save(folder, 20, network(), network(), {}, keep=1)
    monkeypatch.undo()
    files = ["weigh", "ema.s", "state", "manif"]
    assert order[:-1] == [f"sync {name}" for name in (*files, "step-")] + ["rename step-20", "sync check"]
    assert order[-1].startswith("rename .step-")  # of what is deleted


def test_a_checkpoint_that_is_deleted_halfway_is_none(folder, monkeypatch):
    checkpoint, _, _ = saved(folder, 10)

    def halfway(path, *_, **__):
        (Path(path) / "ema.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", halfway)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(checkpoint)
    monkeypatch.undo()
    assert checkpoints.find(folder) == []
    checkpoints.clean(folder)
    assert list(folder.iterdir()) == []


def test_the_newest_whole_checkpoint_is_found_and_the_damaged_are_named(folder):
    for step in (1, 2, 3):
        saved(folder, step)
    (folder / "step-3" / "state.pt").write_bytes(b"")
    said: list[str] = []
    path, contents = checkpoints.latest_valid(folder, said.append)
    assert path == folder / "step-2" and contents.state["steps"] == 2
    assert len(said) == 1 and str(folder / "step-3" / "state.pt") in said[0]
    assert not (folder / "step-3").exists()


def test_what_a_killed_process_left_is_never_taken_for_a_checkpoint(folder):
    checkpoint, _, _ = saved(folder, 10)
    (folder / ".step-half").mkdir()
    (folder / ".step-half" / "weights.safetensors").write_bytes(b"half")
    (folder / "step-20.tmp").mkdir()
    assert checkpoints.find(folder) == [checkpoint] and checkpoints.latest(folder.parent) == checkpoint


def test_the_newest_checkpoints_stay_by_their_number_and_not_by_their_name(folder):
    for step in (2, 9, 10, 100):
        saved(folder, step)
    assert [path.name for path in checkpoints.find(folder)] == ["step-10", "step-100"]
    assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-100"]
    assert checkpoints.latest(folder.parent).name == "step-100"


def test_a_step_that_is_saved_again_is_replaced(folder):
    saved(folder, 5)
    checkpoint, _, ema = saved(folder, 5)
    other = network()
    checkpoints.load_weights(checkpoint, other)
    assert same(other, ema) and len(checkpoints.find(folder)) == 1


def test_a_run_without_a_checkpoint_says_so(folder):
    with pytest.raises(RunError, match="has not saved one yet"):
        checkpoints.latest(folder.parent)


def test_what_is_saved_is_the_average_that_was_kept(folder):
    model = network()
    ema = EMA(model, 0.5)
    ema.watch("model", model)
    for _ in range(3):
        nn.init.normal_(model[0].weight)
        ema.update("model")
    checkpoint = checkpoints.save(folder, 3, model, ema.model, {})
    other = network()
    checkpoints.load_weights(checkpoint, other, ema=True)
    assert same(other, ema.model) and not same(other, model)

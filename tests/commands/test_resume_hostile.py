"""What a run's files say when it is gone on with is checked like what is typed: one line, and nothing is trained."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genzoo.jobs.resume import checked_config, restore
from genzoo.jobs.train import prepare
from genzoo.runs import Run, RunError
from genzoo.training import checkpoints
from genzoo.training.state_checks import check_optimizer_state, check_weights
from tests.commands import SMALL, genzoo
from tests.commands.test_resume import interrupted

State = dict[str, Any]


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> Path:
    """A run that was interrupted, from which all others are copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("halfway"))
        return interrupted(6, *SMALL["wgan_gp"], "logger=csv").absolute()


@pytest.fixture
def run(halfway, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(halfway, tmp_path / "run"))


@pytest.fixture(scope="module")
def module(halfway) -> Any:
    return prepare(checked_config(Run(halfway)), Run(halfway), []).module


@pytest.fixture
def found(halfway) -> tuple[Path, checkpoints.Contents]:
    path = halfway / "checkpoints" / "step-4"
    return path, checkpoints.load(path)


def test_what_training_wrote_is_restored(module, found):
    assert restore(module, *found) > 0 and module.steps == 4


# The state of a training

WRONG = ["4", 4.5, -1, True, None, [4], {}, 2**70, torch.tensor(4), math.nan]
WHOLE = ["steps", "planned_steps", "corrections", "flops", "skipped", "in_a_row", "logged"]
STATES: dict[str, Callable[[State], Any]] = {
    **{
        f"{name}={str(value)[:20]}": (lambda state, name=name, value=value: state.update({name: value}))
        for name in WHOLE
        for value in WRONG
        if not (name == "flops" and value is WRONG[7])  # are many, and no more than that
    },
    **{
        f"train_seconds={value}": (lambda state, value=value: state.update(train_seconds=value))
        for value in ["1", -1.0, math.nan, math.inf, None, [1.0], True]
    },
    "no steps": lambda state: state.pop("steps"),
    "more steps than planned": lambda state: state.update(steps=17),
    "other steps than its name": lambda state: state.update(steps=3, begun=(0, 0.0), fitted=(0, 0.0)),
    "more planned than the budget": lambda state: state.update(planned_steps=17),
    "endless plan": lambda state: state.update(planned_steps=2**52),
    "boundaries of no stage": lambda state: state.update(boundaries=[3]),
    "boundaries of another kind": lambda state: state.update(boundaries={}),
    "speeds of another kind": lambda state: state.update(speeds=["fast"]),
    "negative speeds": lambda state: state.update(speeds=[-1.0]),
    "begun later": lambda state: state.update(begun=(5, 0.0)),
    "begun in one number": lambda state: state.update(begun=0),
    "fitted before time": lambda state: state.update(fitted=(0, -1.0)),
    "averages of others": lambda state: state.update(ema_updates={"train/model": 4}),
    "averages of texts": lambda state: state["ema_updates"].update({"train/critic": "4"}),
    "a negative count": lambda state: state["ema_updates"].update({"train/critic": -4}),
    "a window of texts": lambda state: state["window"].update(loss="x"),
    "a window of numbers": lambda state: state["window"].update({3: torch.zeros(3)}),
    "a long window": lambda state: state["window"].update(loss=torch.zeros(5)),
    "an endless window": lambda state: state["window"].update(loss=torch.zeros(1).expand(10**12)),
    "a sparse window": lambda state: state["window"].update(loss=torch.zeros(3).to_sparse()),
    "a window of matrices": lambda state: state["window"].update(loss=torch.zeros(3, 3)),
    "a window elsewhere": lambda state: state["window"].update(loss=torch.zeros(3, device="meta")),
    "a scaler of texts": lambda state: state.update(scaler={"scale": "x"}),
    "no optimisers": lambda state: state.update(optimizers=[]),
    "optimisers that are none": lambda state: state.update(optimizers=[1, 2]),
    "an optimiser too many": lambda state: state["optimizers"].append(state["optimizers"][0]),
    "optimisers exchanged": lambda state: state["optimizers"].reverse(),
}


def of_optimizer(change: Callable[[dict[str, Any], dict[int, Any]], Any]) -> Callable[[State], Any]:
    def changed(state: State) -> Any:
        first = state["optimizers"][0]
        return change(first["param_groups"][0], first["state"])

    return changed


OPTIMIZERS = {
    "no weights": lambda group, state: group.update(params=[]),
    "weights of another order": lambda group, state: group["params"].reverse(),
    "a text for a rate": lambda group, state: group.update(lr="x"),
    "no number for a rate": lambda group, state: group.update(lr=math.nan),
    "a negative rate": lambda group, state: group.update(lr=-1.0),
    "a weight that is none": lambda group, state: state.update({999: state[0]}),
    "a name for a weight": lambda group, state: state.update(x=state[0]),
    "a list for a state": lambda group, state: state.update({0: [1]}),
    "a moment is missing": lambda group, state: state[0].pop("exp_avg"),
    "a moment too many": lambda group, state: state[0].update(evil=torch.zeros(1)),
    "a moment of another shape": lambda group, state: state[0].update(exp_avg=torch.zeros(3, 3)),
    "a moment that is a number": lambda group, state: state[0].update(exp_avg=0.0),
    "a moment that is a text": lambda group, state: state[0].update(exp_avg="x"),
    "a moment of one number": lambda group, state: state[0].update(
        exp_avg=torch.zeros(1).expand(state[0]["exp_avg"].shape)
    ),
    "a moment of integers": lambda group, state: state[0].update(exp_avg=state[0]["exp_avg"].long()),
    "a moment that is NaN": lambda group, state: state[0]["exp_avg"].fill_(math.nan),
    "a step that is NaN": lambda group, state: state[0]["step"].fill_(math.nan),
    "a step before the first": lambda group, state: state[0]["step"].fill_(-1),
    "a step that is a text": lambda group, state: state[0].update(step="1"),
}
STATES |= {f"an optimiser: {name}": of_optimizer(change) for name, change in OPTIMIZERS.items()}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_a_state_that_no_training_has_written_is_refused_by_its_entry(module, found, change):
    path, contents = found
    change(contents.state)
    with pytest.raises(RunError, match=r"step-4/state\.pt: .") as info:
        restore(module, path, contents)
    assert "\n" not in str(info.value) and len(str(info.value)) < 500


@pytest.mark.parametrize("state", [None, 3, [], "x", torch.zeros(3)], ids=repr)
def test_a_state_that_is_no_mapping_is_refused(module, found, state):
    with pytest.raises(RunError, match=r"state\.pt: holds a \w+, not a mapping"):
        restore(module, found[0], found[1]._replace(state=state))


def test_the_settings_of_an_optimiser_are_the_configurations(module, found):
    path, contents = found
    for group in contents.state["optimizers"][0]["param_groups"]:
        group |= {"betas": (1.0, 1.0), "weight_decay": -5.0, "maximize": True, "lr": 0.001}
    restore(module, path, contents)
    group = module.configure_optimizers()[0].param_groups[0]
    assert group["lr"] == 0.001 and not group["maximize"] and group["weight_decay"] >= 0 and max(group["betas"]) < 1


@pytest.mark.parametrize(
    "make",
    [
        *(torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta),
        *(torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.ASGD, torch.optim.Rprop),
        *(torch.optim.SGD, torch.optim.Adafactor),
        lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9),
        lambda weights: torch.optim.Adam(weights, amsgrad=True, fused=True),
    ],
)
def test_the_state_of_every_optimiser_of_torch_is_taken_as_it_was(make):
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((), (4,), (6, 3), (1, 2, 3, 3))]
    optimizer, other = make(weights), make(copy.deepcopy(weights))
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(check_optimizer_state(kept, other, make, "optimizers[0]"))
    again, before = other.state_dict(), optimizer.state_dict()
    assert again["param_groups"] == before["param_groups"]
    for number, entries in before["state"].items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(again["state"][number][name]), torch.as_tensor(value))
    assert len(before["state"]) == (0 if make is torch.optim.SGD else 4)


# Weights


def test_values_that_no_model_has_are_refused_by_the_name_of_the_weight():
    own = {
        "w": torch.zeros(3),
        "prior.conditioner.probs": torch.full((4,), 0.25),
        "permutation": torch.tensor([2, 0, 1]),
        "counts": torch.zeros(3, dtype=torch.int64),
    }
    check_weights(own, own)
    check_weights({**own, "w": own["w"].double(), "permutation": torch.tensor([0, 1, 2])}, own)
    for name, value, because in [
        ("w", torch.tensor([0.0, math.nan, 0.0]), "NaN"),
        ("w", torch.tensor([0.0, -math.inf, 0.0]), "infinity"),
        ("w", own["w"].long(), "torch.int64"),
        ("prior.conditioner.probs", torch.tensor([1.0, -0.1, 0.1, 0.0]), "probabilities"),
        ("prior.conditioner.probs", torch.zeros(4), "probabilities"),
        ("permutation", torch.tensor([2, 0, 7]), "permutation"),
        ("permutation", torch.tensor([2, 0, 0]), "permutation"),
        ("permutation", torch.tensor([2, 0, -2]), "permutation"),
        ("counts", torch.tensor([1, -1, 0]), "counts"),
    ]:
        with pytest.raises(ValueError, match=f"^{name} .*{because}"):
            check_weights({**own, name: value}, own)


def rewritten(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, and have the manifest say so."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def saved(value: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


def compressed(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return file.getvalue()


BYTES: dict[str, bytes] = {
    "nothing": b"",
    "text": b"no tensors",
    "zeros": bytes(5000),
    "half": saved({"steps": 4})[:300],
    "an older format": saved({"steps": 4}, _use_new_zipfile_serialization=False),
    "compressed": compressed(saved({"x": torch.zeros(10**6)})),
    "another archive": compressed(saved(3)).replace(b"data.pkl", b"date.pkl"),
    "no pickle": saved({"steps": 4}).replace(b"steps", b"\xff\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("content", BYTES.values(), ids=BYTES)
def test_a_file_of_a_state_that_is_none_is_named(run, content):
    checkpoint = run / "checkpoints" / "step-4"
    rewritten(checkpoint, "state.pt", content)
    with pytest.raises(RunError, match=r"state\.pt: .") as info:
        checkpoints.load(checkpoint)
    assert "\n" not in str(info.value)


# As a user meets them


def refused(run: Path, *because: str) -> None:
    """Check that a run is gone on with no further than one line."""
    code, out, err = genzoo(f"resume={run}")
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith("genzoo: "), err
    assert all(word in err.splitlines()[-1] for word in because), err


STATUS = {
    "threads": [100_000, 0, -1, "all", 1.5, True, [4]],
    "data_sha256": [3, "x", "0" * 63, ["0" * 64]],
    "versions": [[], "2.0", {"torch": 2}, {"torch": "\x1b[2J"}],
    "machine": [3, [], {"cpu": ["x"]}, {"cores": "many"}],
    "device": [3, {"cpu": 1}],
    "resumed": [{}, "x", [1]],
    "images": ["many", -1, 1.5, 2**70],
    "train_seconds": ["long", -1, [1]],
    "train_flops": [-1, {}],
    "step": [-3, "x"],
    "model": [["vae"], {}, "../../x"],
    "state": ["finished", 3, ["done"], {}],
    "job": [3],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in STATUS.items() for value in values])
def test_a_status_is_checked_like_what_is_typed(run, key, value):
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, key: value}))
    refused(run, f"{run / 'status.json'}: {key}")


EVENTS = [
    b"[1]", b"3", b'{"event":1}', b'{"event":{"a":1}}', b'{"event":["train"]}', b"{}", b'{"event":"train"}', b"{",
    b'{"event":"train","values":3}', b'{"event":"train","values":{"a":"x"}}', b'{"event":"interim","values":{"a":[1]}}',
    b'{"event":"train","values":{},"images":"x"}', b'{"event":"samples","step":-1}', b'{"event":"x","seconds":true}',
]  # fmt: skip


@pytest.mark.parametrize("line", EVENTS, ids=lambda line: line.decode())
def test_an_event_that_is_none_is_named_by_its_line(run, line):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], line, b"\n", *lines[1:]]))
    before = path.read_bytes()
    refused(run, f"{path}: line 2: ")
    assert path.read_bytes() == before


def test_weights_and_states_are_refused_by_their_file(run, found):
    checkpoint = run / "checkpoints" / "step-4"
    whole = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    rewritten(checkpoint, "state.pt", saved({**found[1].state, "steps": -3}))
    refused(run, str(checkpoint / "state.pt"), "steps=-3")
    rewritten(checkpoint, "state.pt", whole["state.pt"])
    weights = {name: tensor.clone() for name, tensor in found[1].weights.items()}
    max(weights.values(), key=torch.Tensor.numel).view(-1)[-1] = math.nan
    rewritten(checkpoint, "weights.safetensors", checkpoints.save_safetensors(weights))
    refused(run, str(checkpoint), "weights.safetensors", "NaN")


def test_a_run_s_own_processes_are_not_started_and_its_threads_are_no_more_than_the_cores(run, monkeypatch):
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["trainer"] |= {"devices": 8, "nodes": 4, "workers": 200, "threads": 900}
    path.write_text(yaml.safe_dump(config))
    Run(run).update_status(threads=1000)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", lambda *_: pytest.fail("a process was started"))
    before = torch.get_num_threads()
    try:
        code, _, err = genzoo(f"resume={run}")
        assert code == 0, err
        assert torch.get_num_threads() == Run(run).status["threads"] == 1
    finally:
        torch.set_num_threads(before)
    assert "started with trainer.devices=8, resuming with 1: set trainer.devices=8" in err and "trainer.nodes=4" in err
    assert "started with threads 1000, resuming with" in err


def test_the_processes_that_are_typed_are_those_that_are_started(run):
    code, _, err = genzoo(f"resume={run}", "trainer.devices=3")
    assert code == 2 and "trainer.batch_size=64: is not divisible by 3 processes" in err

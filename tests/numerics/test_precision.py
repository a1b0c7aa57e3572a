"""float32 means 24 bits wherever a number is made, and deterministic mode has a cumulative sum."""

from __future__ import annotations

import pytest
import torch

from genzoo.metrics.features import Embedded, SmallConvNet
from genzoo.numerics.precision import cumulative_sum, deterministic, full_float32, triangular_sum
from tests.commands import SMALL, genzoo, untrained


def precisions() -> list[str]:
    backends = torch.backends
    return [part.fp32_precision for part in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)]


@pytest.mark.parametrize("before", ["high", "highest"])
def test_full_precision_holds_inside_and_is_given_back(before):
    torch.set_float32_matmul_precision(before)
    try:
        outside = precisions()
        with pytest.raises(KeyError), full_float32():
            assert precisions() == ["ieee"] * 3
            raise KeyError
        assert precisions() == outside and torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_features_are_made_in_full_precision_whoever_wants_them(monkeypatch):
    seen, forward = [], SmallConvNet.forward
    monkeypatch.setattr(SmallConvNet, "forward", lambda *a: seen.append(precisions()) or forward(*a))
    Embedded("digits")(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert seen == [["ieee"] * 3] and precisions() != seen[0]


@pytest.mark.parametrize("verb", ["evaluate", "sample"])
def test_commands_draw_and_score_in_full_precision(tmp_path, monkeypatch, verb):
    run, model, _ = untrained(tmp_path, *SMALL["realnvp"])
    seen: list[list[str]] = []
    for name in ("sample", "log_prob"):
        original = getattr(type(model), name)

        def recorded(self, *arguments, original=original, **named):
            seen.append(precisions())
            return original(self, *arguments, **named)

        monkeypatch.setattr(type(model), name, recorded)
    words = ["metrics.n=0", "metrics.events=4", "metrics.throughput=2"] if verb == "evaluate" else ["n=2"]
    words += [f"out={tmp_path / 'samples.png'}"] if verb == "sample" else []
    code, _, err = genzoo(verb, f"run={run}", *words)
    assert code == 0, err
    # The trial of the metrics' settings, before anything is scored, makes no number.
    assert len(seen) >= 1 and all(found == ["ieee"] * 3 for found in seen[verb == "evaluate" :])


@pytest.mark.parametrize(("shape", "dim"), [((7,), 0), ((3, 5), 1), ((2, 256, 3), 1)])
def test_a_triangular_sum_is_the_cumulative_sum(shape, dim):
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(triangular_sum(x, dim), x.cumsum(dim), rtol=1e-13, atol=0)
    assert torch.equal(cumulative_sum(x, dim), x.cumsum(dim))


def test_deterministic_mode_is_torchs_own_and_is_left_again(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    deterministic(True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()

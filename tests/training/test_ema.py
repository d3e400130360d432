"""Averages of the weights: widths against integrals, any width from snapshots against the average itself, and a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.integrate import quad
from torch import nn

from mmdiff.config import load_config
from mmdiff.training import loop, train
from mmdiff.training.ema import Ema
from mmdiff.training.width import coefficients, exponent, product, relative_width

SETTINGS = ("train.ema_further_decays=[0.9]", "train.ema_sigma_rel=[0.05,0.1]", "train.ema_snapshot_every=2")


def profile(gamma: float, time: float) -> Callable[[float], float]:
    return lambda tau: (gamma + 1) * tau**gamma / time ** (gamma + 1)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_width_is_the_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    gamma, time = exponent(sigma_rel), 3.0
    assert relative_width(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    weigh = profile(gamma, time)
    mean = quad(lambda tau: tau * weigh(tau), 0, time)[0]
    variance = quad(lambda tau: (tau - mean) ** 2 * weigh(tau), 0, time)[0]
    assert variance**0.5 / time == pytest.approx(sigma_rel, rel=1e-6)


def test_products_of_profiles_are_their_integrals() -> None:
    pairs = [((2.0, 1.5), (5.0, 7.0)), ((5.0, 1.5), (2.0, 7.0)), ((4.0, 3.0), (4.0, 9.0))]
    for (t_a, g_a), (t_b, g_b) in pairs:
        both = quad(lambda t: profile(g_a, t_a)(t) * profile(g_b, t_b)(t), 0, min(t_a, t_b))[0]  # noqa: B023
        assert product((t_a, g_a), (t_b, g_b)) == pytest.approx(both, rel=1e-9)


def averaged(path: torch.Tensor, sigma_rel: float, every: int) -> dict[int, torch.Tensor]:
    """{step: average} of a parameter that takes the values of ``path``, (steps, n), by the class that trains."""
    module = nn.Linear(path.shape[1], 1, bias=False).double()
    ema, kept = Ema(module, 0.9, [sigma_rel]), {}
    for step, value in enumerate(path):
        module.weight.data.copy_(value)
        ema.update(step)
        if (step + 1) % every == 0:
            kept[step + 1] = ema.kept[f"sigma_rel={sigma_rel}"]["weight"][0].clone()
    return kept


def test_an_average_weighs_the_steps_by_the_profile() -> None:
    """Of unit vectors the average is the weights themselves: between the profile at both ends of every step."""
    steps, sigma_rel = 200, 0.1
    weights = averaged(torch.eye(steps, dtype=torch.float64), sigma_rel, steps)[steps].numpy()
    cumulated = (np.arange(1, steps + 1) / steps) ** (exponent(sigma_rel) + 1)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(weights.cumsum(), cumulated, rtol=1e-9)


@pytest.mark.parametrize("wanted", [0.05, 0.07, 0.12, 0.16])
def test_any_width_comes_out_of_two_averages_and_their_snapshots(wanted: float) -> None:
    steps, every = 512, 16
    path = torch.randn(steps, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    kept = {width: averaged(path, width, every) for width in (0.05, 0.1)}
    pairs = [(step, width) for width in kept for step in kept[width]]
    factors, missed = coefficients([s for s, _ in pairs], [exponent(w) for _, w in pairs], steps, exponent(wanted))
    found = sum(factor * kept[width][step] for factor, (step, width) in zip(factors, pairs, strict=True))
    exact = averaged(path, wanted, steps)[steps]
    nearest = min((kept[width][steps] for width in kept), key=lambda other: (other - exact).norm())
    assert missed < 0.02 and factors.sum() == pytest.approx(1, abs=1e-2)
    if wanted in kept:
        assert missed < 1e-6 and (found - exact).norm() <= 1e-6 * exact.norm()
    else:
        assert (found - exact).norm() < 0.1 * (nearest - exact).norm()


def test_further_averages_leave_the_first_as_it_was() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    one, several = Ema(module, 0.9), Ema(module, (0.9, 0.99), (0.05,))
    for step in range(5):
        nn.init.normal_(module.weight)
        one.update(step), several.update(step)
    assert all(torch.equal(average, several.averages[name]) for name, average in one.averages.items())
    assert list(one.tensors()) == ["weight", "bias"] and len(several.tensors()) == 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps with every kind of average; stopped after six and continued."""
    from conftest import tiny_tree
    from omegaconf import OmegaConf

    folder = tmp_path_factory.mktemp("averages")
    OmegaConf.save(OmegaConf.create(tiny_tree(folder / "run")), folder / "tiny.yaml")
    more = ["train.steps=10", "train.checkpoint_every=3", "train.keep_checkpoints=1", "train.resume=auto", *SETTINGS]
    train(load_config(folder / "tiny.yaml", [*more, f"output={folder / 'whole'}"]), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StopSignal, "agreed", lambda self, accelerator, due: due)  # as after a SIGTERM
        train(load_config(folder / "tiny.yaml", more), progress=False)
        shutil.rmtree(folder / "run" / "snapshots" / "step-2")  # of the first three steps: nobody needs it to go on
    return train(load_config(folder / "tiny.yaml", more), progress=False)


def test_every_average_continues_bit_by_bit_and_snapshots_stay(run: Path) -> None:
    whole = run.parent / "whole"
    found, wanted = (load_file(folder / "checkpoints" / "step-10" / "ema.safetensors") for folder in (run, whole))
    assert len(found) == 4 * len([name for name in found if "/" not in name])
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert len(list((whole / "checkpoints").iterdir())) == 1
    assert {path.name for path in (whole / "snapshots").iterdir()} == {f"step-{k}" for k in (2, 4, 6, 8, 10)}
    for file in sorted((run / "snapshots").rglob("*.safetensors")):
        assert file.read_bytes() == (whole / file.relative_to(run)).read_bytes()


def test_a_pipeline_of_another_average_is_made_and_evaluated(
    run: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    assert cli("ema", run, "--decay", "0.9", "--out", tmp_path / "short").code == 0
    made = load_file(tmp_path / "short" / "model" / "diffusion_pytorch_model.safetensors")
    kept = load_file(run / "checkpoints" / "step-10" / "ema.safetensors")
    assert all(torch.equal(tensor, kept[f"decay=0.9/model.{name}"]) for name, tensor in made.items())
    answer = cli("ema", run, "--sigma-rel", "0.1", "--step", "8", "--out", tmp_path / "width")
    assert answer.code == 0, answer.err
    made = load_file(tmp_path / "width" / "model" / "diffusion_pytorch_model.safetensors")
    kept = load_file(run / "snapshots" / "step-8" / "sigma_rel=0.1.safetensors")
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, kept[f"model.{name}"], rtol=1e-5, atol=1e-7)
    again = Path(shutil.copytree(run, tmp_path / "run"))
    assert cli("evaluate", again, "--pipeline", tmp_path / "width", "evaluate.num_samples=16").code == 0
    assert cli("evaluate", again, "evaluate.num_samples=16").code == 0
    told = json.loads((again / "evaluation.json").read_text())
    assert told["manifest"]["weights"] == {"average": "decay=0.999", "step": 10}
    (earlier,) = told["earlier"].values()
    assert (earlier["manifest"]["weights"]["average"], earlier["manifest"]["weights"]["step"]) == ("sigma_rel=0.1", 8)


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (("--decay", "0.5"), "--decay = 0.5: "),
        (("--sigma-rel", "0.1", "--step", "7"), "--step = 7: "),
        (("--sigma-rel", "0.9"), "--sigma-rel = 0.9: "),
        (("--sigma-rel", "0.28"), "--sigma-rel = 0.28: "),
        (("--sigma-rel", "0.1", "--decay", "0.9"), "--sigma-rel = 0.1: "),
        ((), "--sigma-rel = None: "),
    ],
)
def test_an_average_that_a_run_does_not_hold_is_refused(
    run: Path, cli: Callable[..., Any], tmp_path: Path, options: tuple[str, ...], start: str
) -> None:
    answer = cli("ema", run, "--out", tmp_path / "out", *options)
    assert answer.code == 2 and answer.complaint.startswith(start), answer.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_snapshot_is_refused(run: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    file = copy / "snapshots" / "step-6" / "sigma_rel=0.1.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    answer = cli("ema", copy, "--sigma-rel", "0.1", "--out", tmp_path / "out")
    assert answer.code == 2 and "step-6" in answer.complaint and "hash" in answer.complaint

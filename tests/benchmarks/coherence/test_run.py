"""`mmdiff benchmark coherence`: scores by hand, judges, sides that see the same rows, a benchmark that goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.benchmarks.coherence import run as coherence
from mmdiff.benchmarks.coherence.classifiers import classifiers
from mmdiff.benchmarks.coherence.peers import PEERS, _rows, installed, train_peer
from mmdiff.benchmarks.coherence.request import SIDES, Request
from mmdiff.benchmarks.coherence.scores import conditional_coherence, joint_coherence, subsets
from mmdiff.benchmarks.coherence.sides import Budget, Task
from mmdiff.errors import InputError

ROOT = Path(__file__).parents[3]
EXPERIMENT = ROOT / "experiments" / "coherence" / "textured_digits.yaml"
TOY = (
    *("data.options.rows=48", "data.options.validation_rows=8", "data.options.size=8", "train.threads=1"),
    *(
        "backbone.block_out_channels=[8]",
        "backbone.norm_num_groups=4",
        "backbone.attention_head_dim=8",
        "sample.steps=1",
        "train.batch_size=4",
    ),
)
needs_peers = pytest.mark.skipif(not installed(), reason="needs multivae")
Cli = Callable[..., Any]


def toy(out: Path, *more: str, **settings: Any) -> coherence.Benchmark:
    chosen: dict[str, Any] = {"missing": (0.5,), "seconds": 0.01, "seeds": 1, "rows": 6} | settings
    return coherence.Benchmark(Request(EXPERIMENT, (*TOY, *more), out=out, **chosen))


class ReadsBrightness(nn.Module):
    """Class 0 for dark images, 1 for bright ones."""

    def read(self, images: Tensor) -> Tensor:
        bright = images.mean(dim=(1, 2, 3))
        return torch.stack([-bright, bright], dim=1)


JUDGES: Any = dict.fromkeys("abc", ReadsBrightness())


def images(*classes: int) -> Tensor:
    return (2.0 * torch.tensor(classes) - 1)[:, None, None, None].expand(-1, 1, 2, 2)


# --------------------------------------------------------------------------------------------------------------- scores


def test_joint_coherence_is_the_share_of_rows_in_which_all_agree() -> None:
    drawn = {"a": images(0, 1, 1, 0), "b": images(0, 1, 0, 0), "c": images(0, 1, 1, 1)}
    assert joint_coherence(drawn, JUDGES) == 0.5


def test_conditional_coherence_is_a_mean_over_subsets_and_over_what_is_not_given() -> None:
    """``a`` is always right; ``b`` only where ``c`` is given; ``c`` never is."""
    labels = torch.tensor([0, 1])
    truth = dict.fromkeys("abc", images(0, 1))
    seen = []

    def generate(given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tuple(given))
        assert all(values is truth[name] for name, values in given.items())
        right = {"a": True, "b": "c" in given, "c": False}
        return {name: images(0, 1) if right[name] else images(1, 0) for name in "abc" if name not in given}

    one, two = conditional_coherence(generate, truth, labels, JUDGES)
    assert seen == list(subsets("abc")) == [("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c")]
    assert (one["given"], two["given"]) == (1, 2)
    assert one["coherence"] == pytest.approx((0 + 0 + 1 + 0 + 1 + 1) / 6)  # a: b, c; b: a, c; c: a, b
    assert two["coherence"] == pytest.approx((0 + 1 + 1) / 3)  # c, b, a
    assert two["label accuracy"] == pytest.approx(2 / 3)


# --------------------------------------------------------------------------------------------------------------- judges


def test_judges_learn_what_they_see_and_are_kept(tmp_path: Path) -> None:
    labels = torch.arange(200) % 3
    generator = torch.Generator().manual_seed(0)
    shown = torch.randn(200, 1, 8, 8, generator=generator) * 0.1
    shown[torch.arange(200), 0, 2 * labels] += 1.0  # a line, higher or lower
    made = classifiers({"a": shown}, labels, 3, tmp_path / "judges.safetensors")["a"]
    assert float((made.read(shown).argmax(1) == labels).double().mean()) > 0.95
    assert torch.allclose(made.read(shown).exp().sum(1), torch.ones(200))
    kept = (tmp_path / "judges.safetensors").stat().st_mtime_ns
    again = classifiers({"a": shown}, labels, 3, tmp_path / "judges.safetensors")["a"]
    assert torch.equal(again.read(shown), made.read(shown))
    assert (tmp_path / "judges.safetensors").stat().st_mtime_ns == kept


# ---------------------------------------------------------------------------------------------------------------- sides


@pytest.mark.parametrize(
    "side", [name if name not in PEERS else pytest.param(name, marks=needs_peers) for name in SIDES]
)
def test_a_side_draws_what_is_not_given_and_by_its_seed_alone(side: str, tmp_path: Path) -> None:
    benchmark = toy(tmp_path)
    trained = SIDES[side](Task(benchmark.config, benchmark.table), Budget(0.01, 2.0, 0))
    assert trained.facts["steps"] >= 1 and trained.facts["parameters"] > 0
    given = {name: benchmark.truth[name] for name in ("image_1", "image_3")}
    for draw, names in (
        (lambda seed: trained.joint(3, seed), benchmark.names),
        (lambda seed: trained.rest(given, seed), ["image_0", "image_2", "image_4"]),
    ):
        one, again, other = draw(0), draw(0), draw(1)
        assert list(one) == names
        for name in names:
            assert one[name].shape[1:] == (3, 8, 8) and one[name].abs().max() <= 1
            assert torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name])


@needs_peers
@pytest.mark.parametrize("side", PEERS)
def test_a_peer_never_sees_what_is_missing(side: str, tmp_path: Path) -> None:
    """Hidden images may be anything: the trained weights are the same."""
    benchmark = toy(tmp_path)
    benchmark.table.missing = dict.fromkeys(benchmark.config.auxiliary(), 0.3)
    weights = []
    for value in (0.0, 0.7):
        hidden = {name: ~benchmark.table.all().present[name] for name in benchmark.names}
        for name, rows in hidden.items():
            benchmark.table._cache.values[name][rows] = value
        trained = train_peer(side, Task(benchmark.config, benchmark.table), Budget(0.0, 1.0, 0))
        assert trained.facts["steps"] == 1
        weights.append(trained.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_peers_that_need_whole_rows_get_these_alone(tmp_path: Path) -> None:
    benchmark = toy(tmp_path)
    task = Task(benchmark.config, benchmark.table)
    assert len(_rows(task, whole=True)) == 48
    benchmark.table.missing = dict.fromkeys(benchmark.config.auxiliary(), 0.3)
    rows = _rows(task, whole=True)
    assert 2 <= len(rows) < 40 and len(_rows(task, whole=False)) == 48
    assert all(bool(mask[rows].all()) for mask in benchmark.table.all().present.values())


# ------------------------------------------------------------------------------------------------------------ the whole


def test_the_command_leaves_a_table_and_goes_on(cli: Cli, tmp_path: Path) -> None:
    call = ("benchmark", "coherence", EXPERIMENT, *TOY, "--sides", "mmdiff", "--missing", "0.5", "--seconds", "0.01")
    call += ("--seeds", "2", "--rows", "4", "--learning-rates", "1,2", "--out", tmp_path)
    answer = cli(*call)
    assert answer.code == 0, answer.err
    for text in ("judges, accuracy", "50% missing", "given 4", "Fréchet, image_4"):
        assert text in answer.out
    found = json.loads((tmp_path / "textured_digits.json").read_text())
    assert [(row["side"], row["missing"]) for row in found["rows"]] == [("mmdiff", 0.5)]
    assert len(found["rows"][0]["joint"]["by seed"]) == 2 and set(found["rows"][0]["conditional"]) == set("1234")
    assert (tmp_path / "textured_digits.png").stat().st_size > 1000
    assert len(list(tmp_path.glob("*/samples/*.png"))) == 2
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/parts/*.json")}
    assert len(parts) == 2 + 2  # learning rates, then seeds
    lost, *_ = [path for path in parts if "tuning" not in path.name]
    lost.unlink()
    assert cli(*call).code == 0
    now = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/parts/*.json")}
    assert {path for path in parts if now.get(path) != parts[path]} == {lost}


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--sides", "mmdiff,VAE"], "--sides", "VAE"),
        (["--sides", "mmdiff,mmdiff"], "--sides", "mmdiff"),
        (["--missing", "0,1"], "--missing", "1.0"),
        (["--missing", "half"], "--missing", "half"),
        (["--learning-rates", "0"], "--learning-rates", "0.0"),
        (["--seconds", "0"], "--seconds", "0.0"),
        (["--seconds", "nan"], "--seconds", "nan"),
        (["--label", "digit"], "--label", "digit"),
        (["--label", "image_0"], "--label", "image_0"),
        (["modalities.more.kind=label", "data.columns.more=label"], "modalities.more.kind", "label"),
        (["data.missing.image_1=0.5"], "data.missing", "image_1"),
        (["train.lr_scheduler_type=cosine"], "train.lr_scheduler_type", "cosine"),
        (["data.augment.flip=0.5"], "data.augment", "0.5"),
        (["train.initialize_from=runs/digits"], "train.initialize_from", "runs/digits"),
        (["evaluate.features=nowhere.pth"], "evaluate.features", "nowhere.pth"),
        (["data.options.validation_rows=1"], "data", "1"),
        (["data.source=mnist_svhn"], "data.options.rows", "48"),
    ],
)
def test_bad_requests_are_one_line(options: list[str], key: str, value: str, cli: Cli, tmp_path: Path) -> None:
    answer = cli("benchmark", "coherence", EXPERIMENT, *TOY, "--out", tmp_path / "out", *options)
    assert answer.code == 2 and key in answer.err and value in answer.err
    assert len(answer.err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_peers_that_are_not_installed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "multivae", None)  # as if it were not there
    request = Request(EXPERIMENT, sides=("MoPoE",))
    with pytest.raises(InputError, match="pip install"):
        next(coherence.run(request))
    assert coherence.chosen_sides(Request(EXPERIMENT)) == ("mmdiff",)

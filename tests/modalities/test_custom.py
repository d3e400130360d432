"""A modality of one's own: named by import path, trained, saved, loaded only when trusted, and checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import Generator

from mmdiff.build import build
from mmdiff.config import Config, load_config
from mmdiff.errors import InputError
from mmdiff.modalities import Dense, find_modality
from mmdiff.modalities.contract import LAWS
from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.training import train

KIND = "depth_of_a_user.log_depth:Depth"
SOURCE = '''
import numpy as np

from mmdiff.modalities import Dense

CALLS = []


class Depth(Dense):
    """Depth in metres, modelled by its logarithm."""

    @staticmethod
    def read(raw):
        return np.log(Dense.read(raw))

    def postprocess(self, value):
        return [np.exp(one) for one in super().postprocess(value)]


class Shrunk(Depth):
    """Its encodings are too small."""

    def encode(self, value):
        return 0.1 * super().encode(value)


class Tied(Depth):
    """Its head has two names."""

    def __init__(self, shape, **settings):
        super().__init__(shape, **settings)
        self.twin = self.head


def make(*arguments, **settings):
    CALLS.append(arguments)
    return Depth(*arguments, **settings)


class Other:
    def __init__(self, *arguments, **settings):
        CALLS.append(arguments)

    def __init_subclass__(cls):
        CALLS.append(cls)

    @classmethod
    def diffusion_space(cls, **settings):
        CALLS.append(settings)
'''


class User(NamedTuple):
    """A user's package, the depths of its data, and the config of an experiment on them."""

    depths: np.ndarray
    config: Path

    @property
    def loaded(self) -> Any:
        return sys.modules.get("depth_of_a_user.log_depth")

    def forget(self) -> None:
        """As in a process that has never imported the package."""
        for name in [name for name in sys.modules if name.partition(".")[0] == "depth_of_a_user"]:
            del sys.modules[name]


@pytest.fixture
def user(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[User]:
    package = tmp_path / "code" / "depth_of_a_user"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "log_depth.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(package.parent))
    numbers = np.random.default_rng(0)
    depths = np.exp(numbers.normal(1.0, 0.5, size=(24, 16, 16))).astype(np.float32)
    images = [PILImage.fromarray(numbers.integers(256, size=(16, 16), dtype=np.uint8)) for _ in depths]
    features = datasets.Features({"image": datasets.Image(), "metres": datasets.Array2D((16, 16), "float32")})
    rows = datasets.Dataset.from_dict({"image": images, "metres": list(depths)}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    tiny["data"] = {"source": str(tmp_path / "rows.parquet"), "holdout": 4, "columns": {"depth": "metres"}}
    tiny["modalities"] = {"image": {"kind": "image"}, "depth": {"kind": KIND}}
    tiny["train"] |= {"steps": 2, "log_every": 1}
    OmegaConf.save(OmegaConf.create(tiny), tmp_path / "depth.yaml")
    given = User(depths, tmp_path / "depth.yaml")
    yield given
    given.forget()


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_is_trained_saved_and_loaded_when_trusted(user: User) -> None:
    folder = train(load_config(user.config))
    assert [line["step"] for line in lines(folder)] == [1, 2]
    assert all(np.isfinite(line["l2/depth"]) and line["l2/depth"] != 0 for line in lines(folder))
    logs = np.log(user.depths[[k for k in range(24) if k % 4 != 3]])
    settings = load_config(folder / "config.yaml").modalities["depth"].settings()
    assert settings["size"] == [16, 16] and settings["channels"] == 1
    assert settings["mean"] == pytest.approx(logs.mean(), rel=1e-4)
    assert settings["std"] == pytest.approx(logs.std(), rel=1e-4)

    user.forget()
    model = folder / "pipeline" / "model"
    described = MTDiffusionModel.load_config(model)
    for load, source in (
        (MTDiffusionPipeline.from_pretrained, folder / "pipeline"),
        (MTDiffusionModel.from_pretrained, model),
        (MTDiffusionModel.from_config, described),
    ):
        with pytest.raises(InputError) as caught:
            load(source)
        assert str(caught.value).startswith(f"modalities.depth.kind = '{KIND}': is code of its author's")
        assert "trust_custom_modalities=True" in str(caught.value)  # in Python
        assert "--trust-custom-modalities" in str(caught.value)  # on the command line
        assert not user.loaded  # refused before it was imported
        with pytest.raises(InputError, match="is code of its author's"):
            load(source, trust_custom_modalities="no")
        assert not user.loaded
    assert MTDiffusionModel.from_pretrained(model, trust_custom_modalities=True)
    assert MTDiffusionModel.from_config(described, trust_custom_modalities=True).names == ("depth", "image")

    user.forget()
    pipe = MTDiffusionPipeline.from_pretrained(folder / "pipeline", trust_custom_modalities=True)
    assert type(pipe.model.modalities["depth"]) is user.loaded.Depth
    pipe.set_progress_bar_config(disable=True)
    samples = pipe(batch_size=3, num_inference_steps=2, generator=Generator().manual_seed(0)).samples
    assert all(one.shape == (1, 16, 16) and (one > 0).all() for one in samples["depth"])  # metres again
    given = user.depths[:2]
    seen = pipe(observed={"depth": list(given)}, num_inference_steps=2).samples
    assert len(seen["image"]) == 2
    np.testing.assert_allclose(np.stack(seen["depth"])[:, 0], given, rtol=1e-5)


def test_tied_modules_are_saved_once_and_loaded_tied(user: User, tmp_path: Path) -> None:
    tied = ["modalities.depth.kind=depth_of_a_user.log_depth:Tied", "train.lr_scheduler_type=constant"]
    whole = train(load_config(user.config, [*tied, f"output={tmp_path / 'whole'}"]))
    parts = [*tied, f"output={tmp_path / 'parts'}", "train.resume=auto"]
    train(load_config(user.config, [*parts, "train.steps=1"]))
    folder = train(load_config(user.config, parts))
    states = [load_file(run / "checkpoints" / "step-2" / "weights.safetensors") for run in (whole, folder)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    for run, names in zip((whole, folder), states):
        assert any(".depth.head." in name for name in names) and not any(".twin." in name for name in names)
        model = MTDiffusionModel.from_pretrained(run / "pipeline" / "model", trust_custom_modalities=True)
        depth = model.modalities["depth"]
        saved = load_file(run / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
        assert depth.twin.mean.conv.weight is depth.head.mean.conv.weight
        assert torch.equal(depth.twin.mean.conv.weight, saved["modalities.depth.head.mean.conv.weight"])


def test_the_command_line_samples_only_what_is_trusted(user: User, cli: Callable[..., Any], tmp_path: Path) -> None:
    folder = train(load_config(user.config))
    user.forget()
    arguments = ["sample", folder, "--num", 2, "--steps", 1, "--out", tmp_path / "grid.png"]
    answer = cli(*arguments)
    assert answer.code == 2 and answer.complaint.startswith(f"modalities.depth.kind = '{KIND}': is code of its author")
    assert not user.loaded and not (tmp_path / "grid.png").exists()
    answer = cli(*arguments, "--trust-custom-modalities")
    assert answer.code == 0, answer.err
    assert (tmp_path / "grid.png").is_file()


def test_a_run_starts_from_one_that_is_trusted(user: User, cli: Callable[..., Any], tmp_path: Path) -> None:
    folder = train(load_config(user.config))
    start = ["train", user.config, f"train.initialize_from={folder}"]
    answer = cli(*start, f"output={tmp_path / 'same'}")  # its own config names the class
    assert answer.code == 0, answer.err
    user.forget()
    other = [*start, f"output={tmp_path / 'other'}", "modalities.depth.kind=dense"]
    answer = cli(*other)
    assert answer.code == 2 and f"modalities.depth.kind = '{KIND}': is code of its author" in answer.complaint
    assert not user.loaded and not (tmp_path / "other").exists()
    answer = cli(*other, "--trust-custom-modalities")
    assert answer.code == 0, answer.err
    origin = json.loads((tmp_path / "other" / "origin.json").read_text())
    assert "backbone.unet.conv_out.weight" in origin["taken"]
    assert "modalities.depth.head.mean.conv.weight" in origin["new"]  # of another class


@pytest.mark.parametrize("name", ["make", "Other", "CALLS", "nothing"])
def test_what_is_no_modality_is_refused_and_never_called(user: User, name: str) -> None:
    kind = f"depth_of_a_user.log_depth:{name}"
    with pytest.raises(InputError) as caught:
        build(load_config(user.config, [f"modalities.depth.kind={kind}"]))
    remedy = "is no subclass of mmdiff.modalities.Modality or Condition; it was not called"
    assert str(caught.value) == f"modalities.depth.kind = '{kind}': {remedy}"
    assert user.loaded.CALLS == []


@pytest.mark.parametrize("as_anchor", [True, False])
def test_a_folder_that_names_other_code_is_refused_even_when_trusted(
    user: User, as_anchor: bool, tmp_path: Path
) -> None:
    entry = {"kind": "depth_of_a_user.log_depth:Other", "channels": 1, "size": 8}
    image = {"kind": "image", "channels": 1, "size": 8}
    config = {
        "_class_name": "MTDiffusionModel",
        "modality_config": {"image": entry, "rest": image} if as_anchor else {"image": image, "rest": entry},
        "backbone_config": {"kind": "unet"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="is code of its author's"):
        MTDiffusionModel.from_pretrained(tmp_path)
    assert not user.loaded
    with pytest.raises(InputError, match=r"modalities\.\w+\.kind = 'depth_of_a_user.log_depth:Other': is no subclass"):
        MTDiffusionModel.from_pretrained(tmp_path, trust_custom_modalities=True)
    assert user.loaded.CALLS == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("no_such_package:Depth", "cannot be imported: No module named 'no_such_package'"),
        ("depth_of_a_user.nothing:Depth", "cannot be imported: No module named 'depth_of_a_user.nothing'"),
        (":Depth", "is no import path; write one as in my_pkg.depth:Depth"),
        (".depth:Depth", "is no import path"),
        ("depth_of_a_user.log_depth:", "is no import path"),
        ("depth_of_a_user.log_depth:Depth.read", "is no import path"),
        ("depth_of_a_user/log_depth.py:Depth", "is no import path"),
        ("depth", "choose one of "),
    ],
)
def test_import_paths_that_lead_nowhere_are_refused(user: User, kind: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        find_modality(kind, "modalities.depth.kind")
    assert str(caught.value).startswith(f"modalities.depth.kind = '{kind}': {text}")


def test_the_check_passes_what_is_right(user: User, cli: Callable[..., Any]) -> None:
    answer = cli("check-modality", KIND, "channels=1", "size=16", "mean=1.0", "std=0.5")
    assert answer.code == 0, answer.out + answer.err
    shown = answer.out.splitlines()
    assert len(shown) == len(LAWS) and all(line.startswith("ok    ") for line in shown)
    assert cli("check-modality", "label", "num_classes=3", "--space", "2,8,8").code == 0  # and a built-in one


def test_the_check_says_what_is_wrong(user: User, cli: Callable[..., Any]) -> None:
    answer = cli("check-modality", KIND.replace("Depth", "Shrunk"), "channels=1", "size=16")
    assert answer.code == 1 and answer.err == ""
    wrong = [line for line in answer.out.splitlines() if not line.startswith("ok    ")]
    assert wrong[0].startswith("FAIL  unit variance: the mean square of encode(examples) is 0.01, expected 1")
    assert len(answer.out.splitlines()) == len(LAWS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([KIND, "channels=1"], "settings.size = None: is missing and the data do not determine it"),
        ([KIND, "channels=1", "size=16", "depth=3"], "settings.depth = 3: unknown key; Depth takes channels, mean, "),
        ([KIND, "channels=1", "size=16", "--space", "3,x"], "--space = '3,x': write whole numbers with commas"),
        (["depth"], "modality = 'depth': choose one of dense, "),
        ([KIND.replace("Depth", "make")], "modality = 'depth_of_a_user.log_depth:make': is no subclass"),
    ],
)
def test_the_check_refuses_what_it_cannot_run(user: User, cli: Callable[..., Any], arguments: list, text: str) -> None:
    answer = cli("check-modality", *arguments)
    assert answer.code == 2 and answer.complaint.startswith(text)


def test_nested_lists_are_a_column_too(user: User, configure: Callable[..., Config], tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(
        {"image": [PILImage.new("L", (16, 16))] * 8, "depth": [None, *user.depths[:7].tolist()]},
        features=datasets.Features(
            {"image": datasets.Image(), "depth": datasets.List(datasets.List(datasets.Value("float32")))}
        ),
    )
    rows.to_parquet(tmp_path / "nested.parquet")
    config = load_config(user.config, [f"data.source={tmp_path / 'nested.parquet'}", "data.columns.depth=depth"])
    batch = build(config).train.all()
    assert batch.present["depth"].tolist() == [False] + [True] * 5
    expected = torch.from_numpy(np.log(user.depths[:2]))[:, None]
    torch.testing.assert_close(batch.values["depth"][1:3], expected)
    assert issubclass(user.loaded.Depth, Dense)

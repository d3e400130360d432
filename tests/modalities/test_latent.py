"""A latent anchor beside masks, masked images and labels: its autoencoder is saved with the pipeline, never trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from networks import LAYERS
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Generator, Tensor

from mmdiff.build import build, build_stand_in
from mmdiff.config import Config, load_config
from mmdiff.data import open_splits
from mmdiff.errors import InputError
from mmdiff.modalities import Image, Shape
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.training import train
from mmdiff.training.process import make_accelerator
from mmdiff.training.trainer import Trainer

SIZE, FACTOR, LATENTS, SCALE = 32, 4, 4, 0.7


def autoencoder(seed: int = 0, **settings: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=LATENTS,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=SCALE,
        mid_block_add_attention=False,
        **settings,
    ).eval()


def tree(folder: Path) -> dict[str, Any]:
    """Shapes of 32×32 pixels in a latent space of 4×8×8."""
    return {
        "name": "latent",
        "output": str(folder / "run"),
        "data": {
            "source": "shapes",
            "options": {"rows": 64, "validation_rows": 16, "size": SIZE},
            "masking": {"masked": {"pattern": "box", "ratio": 0.3}},
        },
        "modalities": {
            "image": {"kind": "image", "space": "latent", "autoencoder": str(folder / "autoencoder")},
            "mask": {"kind": "mask"},
            "masked": {"kind": "masked_image"},
            "label": {"kind": "label"},
        },
        "backbone": dict(LAYERS),
        "scheduler": {"num_train_timesteps": 50},
        "train": {"steps": 2, "batch_size": 12, "threads": 1, "log_every": 1},
        "sample": {"steps": 2},
        "evaluate": {"at_end": False},
    }


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """`config("modalities.image.scale=2", …)`, with the autoencoder's folder at its place."""
    autoencoder().save_pretrained(tmp_path / "autoencoder")
    OmegaConf.save(OmegaConf.create(tree(tmp_path)), tmp_path / "latent.yaml")
    return lambda *overrides: load_config(tmp_path / "latent.yaml", list(overrides))


class Run(NamedTuple):
    """A finished run whose autoencoder's original folder is gone."""

    folder: Path
    pipe: MTDiffusionPipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("latent")
    autoencoder().save_pretrained(folder / "autoencoder")
    OmegaConf.save(OmegaConf.create(tree(folder)), folder / "latent.yaml")
    finished = train(load_config(folder / "latent.yaml"))
    shutil.rmtree(folder / "autoencoder")
    pipe = MTDiffusionPipeline.from_pretrained(finished / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return Run(finished, pipe)


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=Generator().manual_seed(0)) * 2 - 1


def latent_image(**settings: Any) -> Image:
    given = {"latent_channels": LATENTS, "latent_factor": FACTOR, **settings}
    return Image(Shape((4, 8, 8), 4, 4), channels=3, size=SIZE, space="latent", head=False, **given)


# ------------------------------------------------------------------------------------------------- encode, unencode


@pytest.mark.parametrize("shift", [None, 0.3])
@pytest.mark.parametrize("scale", [1.0, 1.7])
@torch.no_grad()
def test_the_encoding_is_the_mode_of_the_posterior_at_unit_scale(shift: float | None, scale: float) -> None:
    vae, modality = autoencoder(shift_factor=shift), latent_image(scale=scale)
    modality.attach(vae)
    mode = vae.encode(images()).latent_dist.mode()
    expected = (mode - (shift or 0.0)) * SCALE * scale
    torch.testing.assert_close(modality.encode(images()), expected)
    torch.testing.assert_close(modality.unencode(expected), vae.decode(mode).sample, rtol=1e-4, atol=1e-5)
    assert torch.equal(modality.observe(images()), modality.encode(images()))


def test_one_batch_is_encoded_once_and_another_autoencoder_encodes_it_anew() -> None:
    modality, value, calls = latent_image(), images(), []
    first = autoencoder()
    first.encoder.register_forward_hook(lambda *_: calls.append(1))
    modality.attach(first)
    assert torch.equal(modality.encode(value), modality.observe(value)) and len(calls) == 1
    assert not torch.equal(modality.encode(value.flip(0)), modality.encode(value))
    before = modality.encode(value)
    modality.attach(autoencoder(seed=1))
    assert not torch.allclose(modality.encode(value), before, atol=1e-3)


def test_the_files_determine_the_latent_space(tmp_path: Path) -> None:
    autoencoder().save_pretrained(tmp_path)
    found = Image.settings_from_files(space="latent", autoencoder=str(tmp_path))
    assert found == {"latent_channels": LATENTS, "latent_factor": FACTOR}
    assert Image.diffusion_space(channels=3, size=[32, 64], space="latent", **found) == (4, 8, 16)
    assert Image.settings_from_files(space="pixel", autoencoder=str(tmp_path)) == {}


# -------------------------------------------------------------------------------------------------------- never trained


def test_no_parameter_of_the_autoencoder_is_trained_or_saved(config: Callable[..., Config]) -> None:
    experiment = build(config())
    frozen = experiment.model.modalities["image"].frozen
    trainer = Trainer(experiment, make_accelerator(experiment.config.train))
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    loader = trainer.loader(0)
    trainer.step(*next(loader))
    loader.close()
    ours = {p.data_ptr() for p in frozen.parameters()}
    optimized = [p for group in trainer.parallel.optimizer.param_groups for p in group["params"]]
    assert len(optimized) == len([p for p in experiment.objective.parameters() if p.requires_grad])
    assert not ours & {p.data_ptr() for p in optimized}
    assert not ours & {p.data_ptr() for p in experiment.model.state_dict().values()}
    assert not any("frozen" in name or "autoencoder" in name for name in experiment.model.state_dict())
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    experiment.model.train()
    assert not frozen.training


def test_latents_are_not_clipped(config: Callable[..., Config]) -> None:
    experiment = build(config())
    assert experiment.config.scheduler.clip_sample is False and experiment.scheduler.config.clip_sample is False
    with pytest.raises(InputError, match="scheduler.clip_sample = True: the anchor's encodings have no bounds"):
        build(config("scheduler.clip_sample=true"))
    pixels = build(config("modalities.image={kind: image, space: pixel}"))
    assert pixels.config.scheduler.clip_sample is True


# ----------------------------------------------------------------------------------------------------------- end to end


def test_it_trains_and_is_saved_beside_the_model(run: Run) -> None:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    terms = {"l0", "l1", "l3", "l2/label", "l2/mask", "l2/masked", "loss"}
    assert all(terms <= set(line) and all(np.isfinite(line[name]) for name in terms) for line in lines)
    assert sorted(path.name for path in (run.folder / "pipeline").iterdir()) == [
        "autoencoder",
        "average.json",
        "model",
        "model_index.json",
        "scheduler",
    ]
    settings = load_config(run.folder / "config.yaml").modalities["image"].settings()
    assert (settings["latent_channels"], settings["latent_factor"], settings["size"]) == (4, 4, [32, 32])
    saved = load_file(run.folder / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == run.pipe.model.state_dict().keys()
    loaded, original = run.pipe.autoencoder.state_dict(), autoencoder().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in original.items())


def test_samples_are_images_of_pixels(run: Run) -> None:
    samples = run.pipe(batch_size=3, num_inference_steps=2, generator=Generator().manual_seed(0)).samples
    assert [image.size for image in samples["image"]] == [(SIZE, SIZE)] * 3 and samples["image"][0].mode == "RGB"
    assert [mask.size for mask in samples["mask"]] == [(SIZE, SIZE)] * 3 and samples["mask"][0].mode == "P"
    assert [image.mode for image in samples["masked"]] == ["RGBA"] * 3
    assert all(0 <= label < 5 for label in samples["label"])


def test_the_split_of_the_batch_does_not_matter(run: Run) -> None:
    def draw(seeds: list[int]) -> Tensor:
        generators = [Generator().manual_seed(seed) for seed in seeds]
        return run.pipe(len(seeds), num_inference_steps=2, generator=generators, output_type="pt").samples["image"]

    torch.testing.assert_close(torch.cat([draw([0]), draw([1, 2])]), draw([0, 1, 2]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 0])
def test_known_pixels_come_back_bit_for_bit(run: Run, steps: int) -> None:
    known = torch.ones(2, 1, SIZE, SIZE)
    known[:, :, 5:19, 7:30] = 0
    value = torch.cat([images() * known, known], dim=1)
    arguments = {"num_inference_steps": steps, "output_type": "pt", "generator": Generator().manual_seed(0)}
    samples = run.pipe(observed={"masked": value}, **arguments).samples
    where = (known > 0).expand(-1, 3, -1, -1)
    assert torch.equal(samples["image"][where], images()[where])
    assert not (samples["image"][~where] == 0).any() and torch.equal(samples["masked"], value)


def test_an_observed_image_is_returned_as_it_was(run: Run) -> None:
    picture = open_splits("shapes", options={"rows": 2, "size": SIZE})[0][0]["image"]
    samples = run.pipe(observed={"image": picture}).samples
    assert samples["image"][0].tobytes() == picture.tobytes()
    assert samples["mask"][0].size == (SIZE, SIZE)


def test_the_run_can_be_evaluated_without_the_original_folder(run: Run) -> None:
    """What was read from its files is in the run's config."""
    config = load_config(run.folder / "config.yaml")
    assert build_stand_in(config).model.space == (4, 8, 8)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["modalities.image.autoencoder=null"], "autoencoder = None: a latent space needs one; name a hub"),
        (
            ["modalities.image.autoencoder=nowhere/nothing"],
            "modalities.image.autoencoder = 'nowhere/nothing': ",
        ),
        (["modalities.image.space=wavelet"], "space = 'wavelet': choose pixel or latent"),
        (["modalities.image.size=[30, 32]", "modalities.image.resize=true"], "size = (30, 32): must be a multiple of"),
        (
            ["modalities.masked.weight.scale=1"],
            "modalities.masked.weight.schedule = 'constant': MaskedImage is observed or",
        ),
    ],
)
def test_what_cannot_be_is_one_line(config: Callable[..., Config], overrides: list[str], text: str) -> None:
    with pytest.raises(InputError) as caught:
        build(config(*overrides))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipeline_without_its_autoencoder_says_so(run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.folder / "pipeline", tmp_path / "pipeline"))
    shutil.rmtree(folder / "autoencoder")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "autoencoder": [None, None]}))
    with pytest.raises(InputError, match=r"^model_index.json: autoencoder = None: is missing") as caught:
        MTDiffusionPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)

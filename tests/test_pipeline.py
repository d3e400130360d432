"""Sampling: saved and loaded alike, observed values bit-exact, any split of the batch the same."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from networks import random_model
from PIL import Image as PILImage
from refusals import refused
from torch import Generator, Tensor

from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTDiffusionScheduler

T, STEPS, CLASSES = 20, 4, 3
DPM = "DPMSolverMultistepScheduler"
LABELS = torch.tensor([2, 0, 1])
IMAGES = torch.rand(3, 1, 8, 8, generator=Generator().manual_seed(0)) * 2 - 1  # not on the 8-bit grid
PIXELS = np.random.default_rng(0).integers(256, size=(3, 8, 8), dtype=np.uint8)
PICTURES = [PILImage.fromarray(pixels) for pixels in PIXELS]


def build(solver: str = "DDPMScheduler", schedule: str = "bump") -> MTDiffusionPipeline:
    model = random_model(
        {"image": {"kind": "image", "channels": 1, "size": 8}, "label": {"kind": "label", "num_classes": CLASSES}}
    )
    weights = {"label": {"schedule": schedule, "scale": 0.5}}
    scheduler = MTDiffusionScheduler(num_train_timesteps=T, solver=solver, weights=weights)
    return quiet(MTDiffusionPipeline(model=model, scheduler=scheduler))


def quiet(pipe: MTDiffusionPipeline) -> MTDiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def sample(pipe: MTDiffusionPipeline, **arguments: Any) -> dict[str, Any]:
    settings = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "pt"}
    return pipe(**{**settings, **arguments}).samples


def evaluations(pipe: MTDiffusionPipeline, **arguments: Any) -> int:
    return len(times(pipe, **arguments))


def times(pipe: MTDiffusionPipeline, **arguments: Any) -> list[list[int]]:
    """The timesteps of every network evaluation."""
    seen: list[list[int]] = []
    handle = pipe.model.register_forward_hook(lambda model, inputs, output: seen.append(inputs[1].tolist()))
    sample(pipe, **arguments)
    handle.remove()
    return seen


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() == {"image", "label"}
    assert all(torch.equal(one[name], other[name]) for name in one)


# --------------------------------------------------------------------------------------------------- save and load


def test_saved_and_loaded_it_draws_the_same_bits(tmp_path: Path) -> None:
    for solver in ["DDPMScheduler", DPM]:
        pipe = build(solver)
        pipe.save_pretrained(tmp_path)
        loaded = quiet(MTDiffusionPipeline.from_pretrained(tmp_path))
        assert not loaded.model.training
        assert loaded.scheduler.config.solver == solver
        assert_same(sample(pipe, batch_size=2), sample(loaded, batch_size=2))


def test_the_folder_holds_only_safetensors_and_json(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model_index.json", "scheduler"}


def test_other_classes_are_refused_before_anything_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for component, index in itertools.product(
        ["model", "scheduler"], [["trojan_of_mmdiff", "Horse"], [None, None], ["diffusers", "UNet2DModel"], None]
    ):
        build().save_pretrained(tmp_path)
        (tmp_path / "trojan_of_mmdiff.py").write_text("class Horse:\n    from_pretrained = print\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        path = tmp_path / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), component: index}))
        with refused(f"model_index.json: {component}", index):
            MTDiffusionPipeline.from_pretrained(tmp_path)
        assert "trojan_of_mmdiff" not in sys.modules


def test_the_folder_of_another_pipeline_is_refused(tmp_path: Path) -> None:
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with refused("model_index.json: model", None):
        MTDiffusionPipeline.from_pretrained(tmp_path)


def test_another_solver_comes_from_the_config() -> None:
    pipe = build()
    pipe.scheduler = MTDiffusionScheduler.from_config(pipe.scheduler.config, solver=DPM)
    assert_same(sample(pipe, batch_size=2), sample(build(DPM), batch_size=2))
    assert not torch.equal(sample(pipe)["image"], sample(build())["image"])


# ---------------------------------------------------------------------------------------------------- observed values


def test_observed_labels_are_returned() -> None:
    for (raw, expected), guidance_scale in itertools.product(
        [(2, [2, 2, 2]), ([2, 0, 1], [2, 0, 1]), (LABELS, [2, 0, 1]), (torch.tensor(1), [1, 1, 1]), ([1], [1, 1, 1])],
        [1.0, 3.0],
    ):
        pipe = build()
        arguments = {"observed": {"label": raw}, "batch_size": 3, "guidance_scale": guidance_scale}
        as_tensor = sample(pipe, **arguments)["label"]
        assert as_tensor.dtype == torch.int64 and as_tensor.tolist() == expected
        assert sample(pipe, **arguments, output_type="pil")["label"] == expected


def test_observed_pictures_are_returned_pixel_by_pixel() -> None:
    for raw in [PICTURES, PICTURES[:1], PICTURES[0]]:
        pipe = build()
        expected = PICTURES if raw is PICTURES else PICTURES[:1] * 3
        assert sample(pipe, observed={"image": raw}, batch_size=3, output_type="pil")["image"] == expected
        levels = (sample(pipe, observed={"image": raw}, batch_size=3)["image"][:, 0].double() + 1) * 127.5
        assert [np.asarray(picture).tolist() for picture in expected] == levels.round().long().tolist()


def test_observed_image_tensors_are_returned_bit_by_bit() -> None:
    for raw, expected in [(IMAGES, IMAGES), (IMAGES[0], IMAGES[:1].expand(3, -1, -1, -1))]:
        samples = sample(build(), observed={"image": raw}, batch_size=3)
        assert torch.equal(samples["image"], expected)


def test_pictures_survive_every_precision(tmp_path: Path) -> None:
    """Whatever the network computes in: values stay float32."""
    for dtype in [torch.float64, torch.bfloat16]:
        build().save_pretrained(tmp_path)
        pipe = quiet(MTDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=dtype))
        assert sample(pipe, observed={"image": PICTURES}, output_type="pil")["image"] == PICTURES
        assert sample(pipe, observed={"label": 1})["image"].dtype == torch.promote_types(dtype, torch.float32)


def test_everything_observed_is_handed_through() -> None:
    pipe = build()
    everything = {"image": IMAGES, "label": LABELS}
    assert_same(sample(pipe, observed=everything), everything)
    assert evaluations(pipe, observed=everything) == 0


def test_the_batch_is_as_large_as_what_is_observed() -> None:
    assert len(sample(build(), observed={"label": [0, 1, 2, 0]})["image"]) == 4
    assert len(sample(build())["image"]) == 1
    assert len(sample(build(), batch_size=2, observed={"image": PICTURES[0]})["label"]) == 2


def test_without_a_final_read_an_observed_image_is_still_read() -> None:
    arguments = {"observed": {"image": IMAGES}}
    assert_same(sample(build(), **arguments, final_read=False), sample(build(), **arguments))


def test_observed_values_matter() -> None:
    pipe = build()
    zero, one = (sample(pipe, observed={"label": k})["image"] for k in (0, 1))
    assert not torch.equal(zero, one)
    guided = sample(pipe, observed={"label": 0}, guidance_scale={"label": 3.0})["image"]
    assert not torch.equal(zero, guided)
    assert not torch.equal(zero, sample(pipe, observed={"label": 0}, aggregate=False)["image"])


# ------------------------------------------------------------------------------------------------- what is computed


def test_an_image_is_read_in_one_evaluation_without_chance() -> None:
    pipe = build()
    assert times(pipe, observed={"image": IMAGES}) == [[T - 1] * 3]
    one, other = (sample(pipe, observed={"image": IMAGES}, generator=seeded(k)) for k in (0, 1))
    assert_same(one, other)
    observed = {"image": torch.ones(3, dtype=torch.bool)}
    z = torch.zeros(3, 1, 8, 8)
    output = pipe.model(z, torch.full((3,), T - 1), pipe.model.observation({"image": IMAGES}, {}, observed, like=z))
    assert torch.equal(one["label"], output.params["label"].argmax(dim=1))


EVALUATIONS = [
    ({}, STEPS + 1),
    ({"final_read": False}, STEPS),
    ({"observed": {"label": 1}}, STEPS),
    ({"observed": {"label": 1}, "guidance_scale": 2.0}, STEPS),  # both branches in one batch
]


def test_evaluations_are_counted() -> None:
    for (arguments, expected), solver in itertools.product(EVALUATIONS, ["DDPMScheduler", DPM]):
        assert evaluations(build(solver), **arguments) == expected


def test_a_list_of_generators_makes_the_split_of_the_batch_irrelevant() -> None:
    for feedback, solver in itertools.product([None, "draw", "mean"], ["DDPMScheduler", DPM]):
        pipe = build(solver)

        def part(rows: range) -> dict[str, Tensor]:
            return sample(
                pipe, batch_size=len(rows), generator=[seeded(k) for k in rows], feedback=feedback, final_read=False
            )

        whole = part(range(4))
        for parts in ([range(2), range(2, 4)], [range(1), range(1, 4)]):
            pieces = [part(rows) for rows in parts]
            images, labels = (torch.cat([piece[name] for piece in pieces]) for name in ("image", "label"))
            torch.testing.assert_close(images, whole["image"], rtol=1e-4, atol=1e-4)
            assert torch.equal(labels, whole["label"])
        assert not torch.allclose(whole["image"][0], whole["image"][1], atol=1e-2)


def test_without_guidance_and_weights_it_is_the_solver_alone() -> None:
    """DDPM with an ordinary conditional network: the same loop by hand on diffusers' own scheduler."""
    pipe, generator = build(schedule="none"), seeded()
    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    ddpm = DDPMScheduler(T, clip_sample=True, **settings)
    ddpm.set_timesteps(STEPS)
    z = torch.randn(2, 1, 8, 8, generator=generator)
    everywhere, values = torch.ones(2, dtype=torch.bool), {"label": torch.tensor([1, 1])}
    for t in ddpm.timesteps:
        observation = pipe.model.observation(values, {}, {"label": everywhere}, like=z)
        z = ddpm.step(pipe.model(z, t.expand(2), observation).prediction, t, z, generator=generator).prev_sample
    torch.testing.assert_close(sample(pipe, observed={"label": 1}, batch_size=2)["image"], z, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- outputs


def test_output_types() -> None:
    pipe = build()
    tensors, shown = (sample(pipe, batch_size=3, output_type=kind) for kind in ("pt", "pil"))
    assert tensors["image"].shape == (3, 1, 8, 8) and tensors["image"].dtype == torch.float32
    assert tensors["image"].abs().max() <= 1.0  # the last step returns the clipped z_0
    assert tensors["label"].dtype == torch.int64 and set(tensors["label"].tolist()) <= set(range(CLASSES))
    assert shown["label"] == tensors["label"].tolist()
    assert shown["image"] == pipe.model.modalities["image"].postprocess(tensors["image"])


def test_outputs_are_ordinary_tensors() -> None:
    """no_grad, never inference_mode: such tensors cannot be used in autograd later."""
    samples = sample(build())
    assert not any(x.is_inference() or x.requires_grad for x in samples.values())


def test_last_draws_are_reported_when_asked_for() -> None:
    pipe = build()
    settings = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "pt"}
    samples, draws, weights = pipe(**settings, generator=seeded(), return_last_draws=True, return_dict=False)
    assert weights == {}
    assert draws.keys() == {"label"} and draws["label"].shape == (2,)
    assert torch.equal(sample(pipe, batch_size=2, final_read=False)["label"], draws["label"])
    assert_same(samples, sample(pipe, batch_size=2))
    assert pipe(**settings, generator=seeded()).last_draws == {}
    assert pipe(observed={"image": IMAGES}, return_last_draws=True).last_draws == {}


# --------------------------------------------------------------------------------------------------------- refusals

TWO = [seeded(0), seeded(1)]


REFUSED = [
    ({"observed": {"caption": 1}}, "observed.caption", 1),
    ({"observed": {"label": 3}}, "observed.label", 3),
    ({"observed": {"label": [0, -1]}}, "observed.label", -1),
    ({"observed": {"label": torch.tensor([0, 7])}}, "observed.label", 7),
    ({"observed": {"label": "two"}}, "observed.label", "two"),
    ({"observed": {"label": torch.tensor([0.0])}}, "observed.label", "torch.float32 (1,)"),
    ({"observed": {"label": []}}, "observed.label", []),
    ({"observed": {"image": PICTURES[0].resize((9, 8))}}, "observed.image", "9x8"),
    ({"observed": {"image": 3}}, "observed.image", "int"),
    ({"observed": {"image": torch.zeros(2, 1, 8, 9)}}, "observed.image", "torch.float32 (2, 1, 8, 9)"),
    ({"observed": {"image": torch.zeros(8, 8)}}, "observed.image", "torch.float32 (1, 8, 8)"),
    ({"observed": {"image": torch.zeros(2, 1, 8, 8).long()}}, "observed.image", "torch.int64 (2, 1, 8, 8)"),
    ({"observed": {"image": PICTURES, "label": [0, 1]}}, "observed.label", "2 values"),
    ({"observed": {"label": [0, 1]}, "batch_size": 3}, "observed.label", "2 values"),
    ({"output_type": "np"}, "output_type", "np"),
    ({"batch_size": 3, "generator": TWO}, "generator", "2 generators"),
    ({"batch_size": 0}, "batch_size", 0),
    ({"batch_size": -1}, "batch_size", -1),
    ({"batch_size": 3, "max_batch_size": 0}, "max_batch_size", 0),
    ({"aggregate": ["image"]}, "aggregate", "image"),
    ({"num_inference_steps": -1}, "num_inference_steps", -1),
    ({"num_inference_steps": 0}, "num_inference_steps", 0),
    ({"num_inference_steps": 0, "observed": {"label": 1}}, "num_inference_steps", 0),
    ({"num_inference_steps": T + 1}, "num_inference_steps", 21),
    ({"guidance_scale": {"label": 2.0}}, "guidance_scale.label", 2.0),
    ({"feedback": "median"}, "feedback", "median"),
]


def test_bad_arguments_are_refused_in_one_line() -> None:
    pipe = build()
    for arguments, key, value in REFUSED:
        with refused(key, value):
            sample(pipe, **arguments)


def test_a_modality_without_weight_cannot_be_aggregated() -> None:
    with refused("aggregate", "label"):
        sample(build(schedule="none"), aggregate="label")


def test_the_mode_cannot_be_fed_to_a_deterministic_solver() -> None:
    with refused("feedback", "mode"):
        sample(build(DPM), feedback="mode")


# ------------------------------------------------------------------------------------------------------ accelerators


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["DDPMScheduler", "DDIMScheduler", DPM])
def test_the_loop_never_waits_for_the_accelerator(solver: str) -> None:
    """From the first evaluation to the last, any synchronisation is an error (the generator lives on the device)."""
    for arguments in [
        {},
        {"observed": {"label": 1}},
        {"observed": {"label": 1}, "guidance_scale": 2.0},
        {"feedback": "draw"},
    ]:
        pipe = build(solver).to("cuda")
        calls: list[int] = []

        def watch(*_: Any) -> None:
            calls.append(1)
            torch.cuda.set_sync_debug_mode("error" if len(calls) < STEPS else "default")

        settings = {
            "batch_size": 2,
            "final_read": False,
            "num_inference_steps": STEPS,
            "output_type": "pt",
            **arguments,
        }
        pipe(**settings, generator=Generator("cuda"))  # lazy initialisation and tables
        handle = pipe.model.register_forward_pre_hook(watch)
        try:
            pipe(**settings, generator=Generator("cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
            handle.remove()
        assert len(calls) == STEPS

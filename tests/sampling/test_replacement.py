"""Replacement: RePaint's schedule, the law of going back, a Gaussian's conditional, and known pixels bit by bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import AutoencoderKL, RePaintScheduler
from networks import KNOWN, RHO, SCALE, ExactGaussian, alive
from refusals import refused
from torch import Generator, Tensor

from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.sampling.replacement import renoised, replaced, visits
from mmdiff.schedulers import MTDiffusionScheduler

LAYERS = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}


def test_the_schedule_is_repaints() -> None:
    for steps, jumps in itertools.product([1, 2, 7, 20, 50], [(1, 1), (1, 3), (10, 10), (3, 2), (5, 4)]):
        peer = RePaintScheduler(num_train_timesteps=steps)
        peer.set_timesteps(steps, jump_length=jumps[0], jump_n_sample=jumps[1])
        states = [steps - 1]
        for done, back in visits(steps, *jumps):
            after = steps - 2 - done
            states += [after, *range(after + 1, after + back + 1)]  # diffusers goes up one by one
        assert states == [*peer.timesteps.tolist(), -1]


def test_going_back_is_the_transitions_in_between() -> None:
    """Mean and variance of Eq. (1), step by step, the encoding included."""
    for now in [-1, 3, 40]:
        scheduler = MTDiffusionScheduler(num_train_timesteps=50, weights={"label": {"scale": 0.5}})
        z = torch.randn(2, 1, 2, 2, generator=Generator().manual_seed(0), dtype=torch.float64)
        encodings = {"label": torch.ones_like(z)}
        mean, variance = z, torch.zeros((), dtype=torch.float64)
        for t in range(now + 1, 46):
            step = scheduler.transition(mean, torch.full((2,), t), encodings)
            mean, variance = step.mean, variance * scheduler.alphas[t] + step.variance
        found = renoised(scheduler, z, now, 45, encodings, torch.zeros_like(z))
        torch.testing.assert_close(found, mean, rtol=1e-9, atol=1e-12)
        spread = renoised(scheduler, z, now, 45, encodings, torch.ones_like(z)) - found
        torch.testing.assert_close(spread**2, variance.expand_as(z), rtol=1e-9, atol=0)


def test_a_rewound_solver_has_forgotten() -> None:
    """Steps taken again after a rewind equal those of a run that begins there."""
    for solver in ("DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):
        scheduler = MTDiffusionScheduler(num_train_timesteps=50, solver=solver)
        start = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2)
        ends = []
        for first in (3, 1):
            scheduler.set_timesteps(6)
            z = start
            for t in scheduler.timesteps[:first]:
                scheduler.step(z, t, z)
            if first == 3:
                scheduler.rewind(2)
            else:
                scheduler.rewind(0)
            for t in scheduler.timesteps[1:]:
                z = scheduler.step(z, t, z, generator=Generator().manual_seed(int(t))).prev_sample
            ends.append(z)
        assert torch.equal(*ends)
    with refused("count", 7):
        scheduler.rewind(7)


# ----------------------------------------------------------------------------------------- a Gaussian, one pixel known


def unknown_pixel(count: int, resampling: tuple[int, int], steps: int = 60) -> Tensor:
    """The second pixel, by replacement of the first."""
    torch.manual_seed(0)
    model = MTDiffusionModel(
        modality_config={
            "image": {"kind": "image", "channels": 1, "size": [1, 2]},
            "masked_image": {"kind": "masked_image", "channels": 1, "size": [1, 2]},
        },
        backbone_config={"kind": "unet", **LAYERS},
    ).double()
    scheduler = MTDiffusionScheduler(clip_sample=False)
    model.backbone = ExactGaussian(scheduler)
    pipe = MTDiffusionPipeline(model=model.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    value = torch.tensor([[[KNOWN, 0.0]], [[1.0, 0.0]]], dtype=torch.float64)  # (2, 1, 2)
    arguments = {"conditioning": "replacement", "resampling": resampling, "output_type": "pt", "final_read": False}
    found = pipe(count, {"masked_image": value}, steps, generator=Generator().manual_seed(0), **arguments).samples
    assert (found["image"][..., 0] == KNOWN).all()
    return found["image"][..., 1].flatten()


def test_resampling_brings_replacement_to_the_conditional_law() -> None:
    """N(ρ x, s² (1 − ρ²)): the mean of plain replacement is far off, RePaint's resampling brings it near.

    What is left of the standard deviation is DDPM's step: its variance leaves out that of z_0 given z_t.
    """
    n, mean, std = 1000, RHO * KNOWN, SCALE * (1 - RHO**2) ** 0.5
    found = [unknown_pixel(n, resampling) for resampling in ((1, 1), (4, 3), (4, 10))]
    errors = [abs(float(pixels.mean()) - mean) for pixels in found]
    assert errors[0] > 0.15 and errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.03 + 3 * std / n**0.5
    assert float(found[2].std()) == pytest.approx(std, abs=0.05)


# --------------------------------------------------------------------------------------------- what a value makes known


def masked_pipeline(latent: bool, observable: list[str] | None = None) -> MTDiffusionPipeline:
    """Image (8×8 pixels, or 16×16 in a latent space of 4×4), label and masked image; random weights."""
    torch.manual_seed(0)
    image = {"kind": "image", "channels": 3, "size": 16 if latent else 8, "scale": 0.9}
    if latent:
        image |= {"space": "latent", "autoencoder": "nowhere", "latent_channels": 4, "latent_factor": 4}
    model = MTDiffusionModel(
        modality_config={
            "image": image,
            "label": {"kind": "label", "num_classes": 3},
            "masked": {"kind": "masked_image", "channels": 3, "size": 16 if latent else 8},
        },
        backbone_config={"kind": "unet", **LAYERS},
        observable=observable,
    )
    alive(model)
    encoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    weights = {"label": {"schedule": "bump", "scale": 0.5}}
    scheduler = MTDiffusionScheduler(num_train_timesteps=20, clip_sample=not latent, weights=weights)
    pipe = MTDiffusionPipeline(model=model, scheduler=scheduler, autoencoder=encoder if latent else None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def masked(size: int) -> Tensor:
    """The upper rows and a few single pixels are known."""
    generator = Generator().manual_seed(3)
    known = (torch.rand(2, 1, size, size, generator=generator) < 0.3).float()
    known[:, :, : size // 2] = 1
    pixels = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    return torch.cat([pixels * known, known], dim=1)


@pytest.mark.parametrize("latent", [False, True])
def test_known_pixels_come_back_bit_by_bit(latent: bool) -> None:
    for ways in [None, "replacement", ["concatenation", "replacement"]]:
        value = masked(16 if latent else 8)
        pipe = masked_pipeline(latent)
        with torch.no_grad():
            found = pipe(None, {"masked": value}, 4, conditioning=ways, output_type="pt", generator=Generator()).samples
        known = value[:, -1:].expand_as(found["image"]) > 0
        assert torch.equal(found["image"][known], value[:, :-1][known]) and torch.equal(found["masked"], value)
        assert not torch.equal(found["image"][~known], value[:, :-1][~known])


def test_pasting_back_can_be_left_out() -> None:
    """What is drawn or read stays as it is; pasted back afterwards it is the pipeline's own answer."""
    for steps, size in itertools.product([0, 3], [None, 1]):
        value, pipe = masked(8), masked_pipeline(False)
        drawn, pasted = (
            pipe(
                observed={"masked": value},
                num_inference_steps=steps,
                output_type="pt",
                generator=[Generator().manual_seed(k) for k in range(2)],
                max_batch_size=size,
                paste_back=paste_back,
                final_read=False,
            ).samples["image"]
            for paste_back in (False, True)
        )
        known = value[:, -1:].expand_as(drawn) > 0
        assert not torch.isclose(drawn[known], value[:, :-1][known]).any()
        assert torch.equal(torch.where(known, value[:, :-1], drawn), pasted)


@torch.no_grad()
def test_a_latent_cell_is_known_where_all_its_pixels_are() -> None:
    for latent, cell in ((True, 4), (False, 1)):
        model, value = masked_pipeline(latent).model, masked(16 if latent else 8)
        part = model.modalities["masked"].known_part(value, model.modalities["image"])
        assert part.encoding.shape == (2, *model.space) and part.mask.shape == (2, 1, *model.space[1:])
        blocks = value[:, -1].unfold(1, cell, cell).unfold(2, cell, cell)  # (B, H, W, cell, cell)
        assert torch.equal(part.mask[:, 0], (blocks == 1).all(-1).all(-1)) and part.mask.any()
        if not latent:
            where = part.mask.expand_as(part.encoding)
            assert torch.equal(part.encoding[where], value[:, :-1][where] * 0.9)


@torch.no_grad()
def test_the_known_part_of_the_last_state_is_the_encoding_itself() -> None:
    model, scheduler = masked_pipeline(True).model, MTDiffusionScheduler()
    part = model.modalities["masked"].known_part(masked(16), model.modalities["image"])
    z = torch.zeros(2, *model.space)
    found = replaced(scheduler, z, -1, [part], {}, torch.ones_like(z))
    assert torch.equal(found, torch.where(part.mask, part.encoding, z))


def test_resampling_costs_what_the_schedule_says() -> None:
    for jumps, expected in [((1, 1), 4), ((1, 3), 4 + 3 * 2), ((2, 2), 4 + 2), ((9, 9), 4)]:
        pipe, calls = masked_pipeline(False), []
        pipe.model.register_forward_hook(lambda *_: calls.append(1))
        settings = {"conditioning": {"masked": "replacement"}, "resampling": jumps, "final_read": False}
        pipe(2, {"masked": masked(8)}, 4, **settings)
        assert len(calls) == expected


def test_without_training_on_holes_replacement_is_the_default() -> None:
    pipe, value = masked_pipeline(False, observable=["image", "label"]), masked(8)
    settings = {"resampling": (1, 2), "output_type": "pt"}
    default, named = (
        pipe(2, {"masked": value}, 4, conditioning=ways, generator=Generator().manual_seed(0), **settings).samples
        for ways in (None, "replacement")
    )
    assert torch.equal(default["image"], named["image"])
    with refused("conditioning", "concatenation"):
        pipe(2, {"masked": value}, 4, conditioning="concatenation")

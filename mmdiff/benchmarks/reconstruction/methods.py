"""Ways to fill the holes of images: mmdiff's own, RePaint, SDEdit, and baselines that need no model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import RePaintScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mmdiff.benchmarks.reconstruction.trained import Trained
from mmdiff.errors import InputError
from mmdiff.modalities.masked_image import mean_fill, smooth_fill
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.sampling.guidance import branches_of
from mmdiff.schedulers.predictions import PREDICTIONS

Generators = list[torch.Generator]
Setting = dict[str, Any]


class Options(NamedTuple):
    """What a call asks of the methods: each value makes a row of its own."""

    steps: tuple[int, ...] = (20,)  # of mmdiff's draws
    guidance: tuple[float, ...] = (1.0,)  # classifier-free, of mmdiff's draws given the masked image in channels
    repaint: tuple[tuple[int, int, int], ...] = ((5, 3, 20),)  # (jump_length, jump_n_sample, steps): 50 evaluations
    sdedit: tuple[int, ...] = (50,)  # evaluations


DEFAULTS = Options()


class Method(NamedTuple):
    """A way to fill holes.

    ``fill(run, pixels, known, generators, **setting)`` takes pixels (n, C, H, W) in [−1, 1], 0 in the hole, known
    (n, 1, H, W), 1 = known, and a generator per image, and gives images (n, C, H, W), known pixels as the method left
    them. ``able`` says which runs can do it, None that it needs none. ``settings`` are its rows, ``candidates`` what is
    chosen on training images, ``seeded`` whether it draws.
    """

    fill: Callable[..., Tensor]
    able: Callable[[Trained], bool] | None = None
    settings: Callable[[Trained | None, Options], list[Setting]] = lambda run, options: [{}]
    candidates: Mapping[str, tuple[Any, ...]] = {}
    seeded: bool = True

    def trials(self) -> list[Setting]:
        """Every combination of its candidates."""
        return [dict(zip(self.candidates, chosen)) for chosen in itertools.product(*self.candidates.values())]


# ---------------------------------------------------------------------------------------------------------- baselines


def masked_input(run: None, pixels: Tensor, known: Tensor, generators: Generators) -> Tensor:
    """The masked image as it is, grey in the hole."""
    return pixels * known


def blur(run: None, pixels: Tensor, known: Tensor, generators: Generators = (), width: float = 1 / 16) -> Tensor:
    """Means of known pixels, weighted by a Gaussian of the distance; ``width`` σ as a part of the shorter side."""
    return smooth_fill(pixels, known, width)


def telea(run: None, pixels: Tensor, known: Tensor, generators: Generators) -> Tensor:
    """OpenCV's fast marching (Telea, 2004), radius 3 pixels, on 8-bit images."""
    import cv2

    return _opencv(pixels, known, cv2.INPAINT_TELEA)


def navier_stokes(run: None, pixels: Tensor, known: Tensor, generators: Generators) -> Tensor:
    """OpenCV's Navier–Stokes inpainting (Bertalmio et al., 2001), radius 3 pixels, on 8-bit images."""
    import cv2

    return _opencv(pixels, known, cv2.INPAINT_NS)


def _opencv(pixels: Tensor, known: Tensor, flag: int) -> Tensor:
    import cv2

    levels = ((pixels * known).clamp(-1, 1).add(1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    holes = (1 - known[:, 0]).mul(255).byte().cpu().numpy()
    filled = [cv2.inpaint(image, hole, 3, flag).reshape(image.shape) for image, hole in zip(levels, holes)]
    images = torch.stack([torch.from_numpy(image) for image in filled]).permute(0, 3, 1, 2)  # (n, C, H, W) uint8
    return images.to(pixels) / 127.5 - 1


# -------------------------------------------------------------------------------------------------------- mmdiff's own


def head(run: Trained, pixels: Tensor, known: Tensor, generators: Generators) -> Tensor:
    """The masked image's head, in one evaluation."""
    return _asked(run, pixels, known, num_inference_steps=0)


def draws(
    run: Trained,
    pixels: Tensor,
    known: Tensor,
    generators: Generators,
    conditioning: str,
    steps: int,
    guidance: float = 1.0,
) -> Tensor:
    """One draw by the pipeline; ``conditioning`` has names of `sampling.conditioning.METHODS` with plus signs."""
    return _asked(
        run,
        pixels,
        known,
        num_inference_steps=steps,
        conditioning=conditioning.split("+"),
        guidance_scale=guidance,
        resampling=(1, 1),
        generator=generators,
    )


def _asked(run: Trained, pixels: Tensor, known: Tensor, **arguments: Any) -> Tensor:
    value = torch.cat([pixels * known, known], dim=1)
    output = run.pipeline(
        observed={run.masked: value}, output_type="pt", paste_back=False, final_read=False, **arguments
    )
    return output.samples[run.config.anchor]


def _drawn(conditioning: str, trained: Callable[[Trained], bool]) -> Method:
    def settings(run: Trained, options: Options) -> list[Setting]:
        guided = options.guidance if "concatenation" in conditioning and run.observed < 1 else (1.0,)
        return [
            {"conditioning": conditioning, "steps": steps} | ({"guidance": scale} if scale != 1 else {})
            for steps in options.steps
            for scale in guided
        ]

    return Method(draws, lambda run: run.masked is not None and run.denoises and trained(run), settings)


# --------------------------------------------------------------------------------------- an unconditional diffusion's


def repaint(
    run: Trained, pixels: Tensor, known: Tensor, generators: Generators, jumps: tuple[int, int, int], eta: float
) -> Tensor:
    """RePaint (Lugmayr et al., 2022) by diffusers; ``jumps`` = (jump_length, jump_n_sample, steps)."""
    length, samples, steps = jumps
    solver = repaint_solver(run, eta)
    solver.set_timesteps(steps, length, samples)
    z_t = _noise(run, pixels, generators)
    return _reversed(run, solver, solver.timesteps.tolist(), z_t, pixels, known, generators)


def sdedit(
    run: Trained, pixels: Tensor, known: Tensor, generators: Generators, steps: int, strength: float, eta: float
) -> Tensor:
    """SDEdit with a mask (Meng et al., 2022): the blurred fill, noised to a share of the path, is denoised again.

    Known pixels are replaced after every step, as there; that is RePaint without resampling, from another start.
    """
    solver, total = repaint_solver(run, eta), len(run.pipeline.scheduler)
    parts = total // max(1, int(total * strength / steps))  # RePaintScheduler knows equal spacings only
    solver.set_timesteps(parts, jump_length=parts, jump_n_sample=1)
    timesteps = solver.timesteps.tolist()[-steps:]
    guide = run.pipeline.model.modalities[run.config.anchor].encode(
        torch.where(known > 0, pixels, blur(None, pixels, known))
    )
    start = torch.full((len(guide),), timesteps[0], device=guide.device)
    z_t = run.pipeline.scheduler.add_noise(guide, _noise(run, pixels, generators), start)
    return _reversed(run, solver, timesteps, z_t, pixels, known, generators)


def repaint_solver(run: Trained, eta: float) -> RePaintScheduler:
    """With the run's own noise schedule; predictions are clipped in `predicted_noise`."""
    betas = (1 - run.pipeline.scheduler.alphas).numpy()
    return RePaintScheduler(num_train_timesteps=len(betas), trained_betas=betas, eta=eta, clip_sample=False)


def _reversed(
    run: Trained,
    solver: RePaintScheduler,
    timesteps: list[int],
    z_t: Tensor,
    pixels: Tensor,
    known: Tensor,
    generators: Generators,
) -> Tensor:
    """The loop of diffusers' RePaintPipeline: down by `step`, up by `undo_step`."""
    anchor, last = run.pipeline.model.modalities[run.config.anchor], timesteps[0] + 1
    original = anchor.encode(pixels * known)
    for timestep in timesteps:
        if timestep < last:
            noise = predicted_noise(run.pipeline, z_t, timestep)
            z_t = solver.step(noise, timestep, z_t, original, known, generators).prev_sample
        else:
            z_t = solver.undo_step(z_t, last, generators)
        last = timestep
    return anchor.unencode(z_t)


@torch.no_grad()
def predicted_noise(pipeline: MTDiffusionPipeline, z_t: Tensor, timestep: int) -> Tensor:
    """The noise that the network's prediction of u_t = z_t stands for, x̂_0 clipped as the run's own solver does."""
    model, scheduler = pipeline.model, pipeline.scheduler
    branches = branches_of(model, {}, (), (), (), like=z_t)
    times = torch.full((len(z_t),), timestep, device=z_t.device)
    original = scheduler.predict_original_sample(model(z_t, times, branches.observation).prediction, timestep, z_t)
    if scheduler.config.clip_sample:
        original = original.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    return PREDICTIONS["epsilon"].output(original, z_t, *scheduler.signal_and_noise(timestep))


def _noise(run: Trained, pixels: Tensor, generators: Generators) -> Tensor:
    return randn_tensor(pixels.shape, generator=generators, device=pixels.device, dtype=pixels.dtype)


#: {name: Method}; the names are those of --methods.
METHODS: dict[str, Method] = {
    "masked": Method(masked_input, seeded=False),
    "mean": Method(lambda run, pixels, known, generators=(): mean_fill(pixels, known), seeded=False),
    "blur": Method(blur, candidates={"width": (1 / 32, 1 / 16, 1 / 8)}, seeded=False),
    "telea": Method(telea, seeded=False),
    "navier-stokes": Method(navier_stokes, seeded=False),
    "head": Method(head, lambda run: run.has_head, seeded=False),
    "concatenation": _drawn("concatenation", lambda run: run.observed > 0),
    "replacement": _drawn("replacement", lambda run: run.observed < 1),
    "concatenation+replacement": _drawn("concatenation+replacement", lambda run: run.observed > 0),
    "repaint": Method(
        repaint,
        lambda run: run.is_plain,
        lambda run, options: [{"jumps": list(jumps)} for jumps in options.repaint],
        {"eta": (0.0, 1.0)},
    ),
    "sdedit": Method(
        sdedit,
        lambda run: run.is_plain,
        lambda run, options: [{"steps": steps} for steps in options.sdedit],
        {"strength": (0.2, 0.4, 0.6, 0.8, 1.0), "eta": (0.0, 1.0)},
    ),
}


class Entry(NamedTuple):
    """A row of the table: a method with its setting, of a run or of none."""

    run: Trained | None
    method: str
    setting: Setting

    @property
    def label(self) -> str:
        """ "cifar10_multitask: channels (steps 20)"."""
        text = ", ".join(f"{key} {_short(value)}" for key, value in self.setting.items() if key != "conditioning")
        return f"{f'{self.run.name}: ' if self.run else ''}{self.method}{f' ({text})' if text else ''}"


def entries(runs: Sequence[Trained], options: Options, names: Sequence[str] | None = None) -> list[Entry]:
    """The baselines, and what each run was trained for.

    Raises:
        InputError: for an unknown name, and one that no run can do.
    """
    for name in names or ():
        if name not in METHODS:
            raise InputError("--methods", name, f"choose from {', '.join(METHODS)}")
    chosen = {name: METHODS[name] for name in METHODS if names is None or name in names}
    able = [Entry(None, name, {}) for name, method in chosen.items() if method.able is None]
    for run in runs:
        for name, method in chosen.items():
            if method.able is not None and method.able(run):
                able += [Entry(run, name, setting) for setting in method.settings(run, options)]
    for name in set(names or ()) - {entry.method for entry in able}:
        raise InputError("--methods", name, f"none of {', '.join(run.name for run in runs)} was trained for it")
    return able


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else f"{value:g}"

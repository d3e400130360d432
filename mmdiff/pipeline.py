"""Sampling: any subset of the modalities in, the rest out."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.modalities import Modality
from mmdiff.model import MTDiffusionModel, complete, dtypes, in_dtype
from mmdiff.sampling.arguments import check_finite, generators, memory_errors, scales
from mmdiff.sampling.batching import in_batches
from mmdiff.sampling.components import HUB_ARGUMENTS, check_components, check_together, read_index
from mmdiff.sampling.conditioning import Conditioning, Ways, aggregated_names, conditioning_of, feedback_for
from mmdiff.sampling.guidance import branches, fed_encoding, steered
from mmdiff.sampling.heads import heads, heads_of_noised_anchor, read_levels
from mmdiff.sampling.observed import observed_values, weights_of
from mmdiff.sampling.replacement import renoised, replaced, visits
from mmdiff.schedulers import SCHEDULERS, MTScheduler, as_ours
from mmdiff.trust import check_links, damage
from mmdiff.values import check_names, plain, switch, whole

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class MTDiffusionPipelineOutput(BaseOutput):
    """``samples`` {modality: list of what a person wants, or tensor}; ``last_draws`` {unobserved auxiliary: values
    drawn from the heads in the last denoising step}, empty unless asked for and where nothing was denoised; ``weights``
    {observed modality of several parts, such as a set of images: how much each part matters (B, n)}.

    A modality that only conditions is in ``samples`` where it was observed."""

    samples: dict[str, Any]
    last_draws: dict[str, Any]
    weights: dict[str, Tensor]


class MTDiffusionPipeline(DiffusionPipeline):
    """Joint and conditional sampling with one model.

    Args:
        model: the networks.
        scheduler: the reverse process; for another solver take
            `type(scheduler).from_config(scheduler.config, solver=…)`.
        autoencoder: of a latent anchor; by default the one that the model's anchor names.
    """

    model_cpu_offload_seq = "model"
    _optional_components = ["autoencoder"]

    def __init__(
        self, model: MTDiffusionModel, scheduler: MTScheduler, autoencoder: AutoencoderKL | None = None
    ) -> None:
        super().__init__()
        check_components(model, autoencoder)
        scheduler = as_ours(scheduler, None)
        anchor = model.modalities[model.anchor]
        if autoencoder is not None:
            anchor.attach(autoencoder)
        self.register_modules(model=model, scheduler=scheduler, autoencoder=anchor.frozen)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        trust_custom_modalities: bool = False,
        model: MTDiffusionModel | None = None,
        scheduler: MTScheduler | None = None,
        autoencoder: AutoencoderKL | None = None,
        torch_dtype: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> MTDiffusionPipeline:
        """Load a folder or a hub repository that `save_pretrained` or `push_to_hub` wrote.

        Args:
            pretrained_model_name_or_path: the folder or the repository.
            trust_custom_modalities: import the modalities that the model's config names by import path.
            model, scheduler, autoencoder: used in place of the folder's own.
            torch_dtype, dtype: of the networks, either of them: a torch dtype, its name, "auto" (float32), or
                {component: dtype}, "default" standing for the others.
            kwargs: of the hub: revision, token, cache_dir, local_files_only, force_download.

        Raises:
            InputError: when the folder holds another pipeline or a link out of it, or names custom modalities that are
                not trusted; nothing of it is imported or run.
        """
        check_names(kwargs, [*list(inspect.signature(cls.from_pretrained).parameters)[1:-1], *HUB_ARGUMENTS])
        path, chosen = pretrained_model_name_or_path, dtypes(torch_dtype, dtype)
        check_links("pipeline", path)
        index = read_index(cls, path, **kwargs)
        if model is None:
            trust = {"trust_custom_modalities": trust_custom_modalities}
            model = MTDiffusionModel.from_pretrained(path, subfolder="model", dtype=chosen["model"], **trust, **kwargs)
        if not isinstance(scheduler, MTScheduler):
            kind = next(kind for kind in SCHEDULERS.values() if kind.__name__ == index["scheduler"][1])
            with damage("scheduler", path):
                own = kind.from_pretrained(path, subfolder="scheduler", **kwargs)
            scheduler = own if scheduler is None else as_ours(scheduler, own)
        if autoencoder is None and index.get("autoencoder", [None])[0] is not None:
            with damage("autoencoder", path):
                own = AutoencoderKL.from_pretrained(path, subfolder="autoencoder", use_safetensors=True, **kwargs)
            autoencoder = in_dtype(own, chosen["autoencoder"])
        check_components(model, autoencoder)
        return cls(model=complete(model, autoencoder).eval(), scheduler=scheduler, autoencoder=autoencoder)

    def __setattr__(self, name: str, value: Any) -> None:
        """A scheduler of diffusers becomes ours with that solver; a component of another kind is refused."""
        if name == "scheduler":
            value = as_ours(value, self.__dict__.get(name))
        if name in ("model", "scheduler"):
            check_together(**{"model": None, "scheduler": None, **self.__dict__, name: value})
        super().__setattr__(name, value)

    @torch.no_grad()
    @memory_errors()
    def __call__(
        self,
        batch_size: int | None = None,
        observed: Mapping[str, Any] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | Mapping[str, float] = 1.0,
        conditioning: Ways | Mapping[str, Ways] | None = None,
        head_guidance_scale: float | Mapping[str, float] = 1.0,
        resampling: tuple[int, int] = (2, 5),
        read_timesteps: Sequence[int] | None = None,
        aggregate: bool | Iterable[str] | None = None,
        feedback: str | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        paste_back: bool = True,
        final_read: bool = True,
        return_last_draws: bool = False,
        max_batch_size: int | None = None,
        return_dict: bool = True,
    ) -> MTDiffusionPipelineOutput | tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
        """Draw every modality that is not observed.

        Args:
            batch_size: how many samples; by default as many as are observed, or 1.
            observed: {modality: one raw value (int, PIL image …), a list of them, or a tensor of values}; single
                values are broadcast. Observed values are returned bit-exactly, and so are the anchor's pixels that they
                fix. With the anchor observed, one network evaluation reads the rest.
            num_inference_steps: solver steps. 0: nothing is denoised; what is unobserved is read from the heads in one
                evaluation at t = T, the anchor from the head of an observed modality that predicts it (masked image).
            guidance_scale: classifier-free, a number or {observed modality: number}; 1 is off. Needs concatenation.
            conditioning: how observed values steer (README, Theory, section 5): one or several of "concatenation",
                "aggregation", "head-guidance" and "replacement" for all, or {modality: one or several}; by default as
                trained: observation channels, and c_t for what is aggregated.
            head_guidance_scale: of "head-guidance", one number or {modality: number}; 1 is exact for exact heads.
            resampling: of "replacement", RePaint's (jump_length, jump_n_sample), its own choice being (10, 10) for 250
                steps; (1, 1) takes every step once.
            read_timesteps: read the heads from the anchor noised to these timesteps, one evaluation each, and average
                their laws; by default one evaluation, the anchor in its observation channels (where training never
                showed it there: unnoised, at timestep 0).
            aggregate: which modalities take part in c_t: True (default: all with weights), False, or names.
            feedback: how unknown aggregated modalities are fed back: "draw", "mean" or "mode"; by default "draw" for
                stochastic and "mean" for deterministic solvers.
            generator: one, or a list of one per sample, with which results do not depend on the batch's split. One
                is drawn from batch by batch: another split gives other samples of the same law.
            output_type: "pil" (what a person wants) or "pt" (tensors: images in [−1, 1], class ids).
            paste_back: put what observed values fix of the anchor (known pixels) back into it; False: as it was drawn.
            final_read: read unobserved modalities from the finished anchor in one more evaluation; False returns the
                draws of the last denoising step.
            return_last_draws: report those draws beside the final read.
            max_batch_size: how many samples are computed at once; guidance evaluates them once more for each modality.
            return_dict: False returns the tuple (samples, last_draws, weights).

        Raises:
            InputError: naming the argument, the value and the remedy.
        """
        if not isinstance(output_type, str) or output_type not in ("pil", "pt"):
            raise InputError("output_type", output_type, "choose pil or pt")
        batch_size = None if batch_size is None else whole("batch_size", batch_size, 1)
        max_batch_size = None if max_batch_size is None else whole("max_batch_size", max_batch_size, 1)
        paste_back, final_read = switch("paste_back", paste_back), switch("final_read", final_read)
        return_last_draws = switch("return_last_draws", return_last_draws)
        return_dict = switch("return_dict", return_dict)
        num_inference_steps = whole("num_inference_steps", num_inference_steps, 0)
        guidance_scale = scales("guidance_scale", guidance_scale)
        head_guidance_scale = scales("head_guidance_scale", head_guidance_scale)
        resampling, read_timesteps = plain("resampling", resampling), plain("read_timesteps", read_timesteps)
        values = observed_values(self.model, {} if observed is None else observed, batch_size)
        count = len(next(iter(values.values()))) if values else batch_size or 1
        generator = generators(generator, count)
        names = aggregated_names(aggregate, self.peak_weights())
        denoising = num_inference_steps != 0
        plan = conditioning_of(
            self.model, values, conditioning, names, guidance_scale, head_guidance_scale, resampling, denoising
        )
        levels = read_levels(read_timesteps, self.model, len(self.scheduler))
        if max_batch_size is not None and count > max_batch_size:
            samples, draws, weights = in_batches(
                self,
                max_batch_size,
                count,
                values,
                generator,
                num_inference_steps=num_inference_steps,
                conditioning=conditioning,
                guidance_scale=guidance_scale,
                head_guidance_scale=head_guidance_scale,
                resampling=resampling,
                aggregate=names,
                feedback=feedback,
                read_timesteps=read_timesteps,
                output_type=output_type,
                paste_back=paste_back,
                final_read=final_read,
                return_last_draws=return_last_draws,
            )
            return MTDiffusionPipelineOutput(samples, draws, weights) if return_dict else (samples, draws, weights)
        draws: dict[str, Tensor] = {}
        samples = dict(values)
        if self.model.anchor not in values:
            if num_inference_steps == 0:
                samples |= self._read_hidden_anchor(values, plan.channels)
            else:
                z_0, draws = self._denoise(values, count, num_inference_steps, plan, feedback, generator)
                samples[self.model.anchor] = self.model.modalities[self.model.anchor].unencode(z_0)
            for name, value in values.items() if paste_back else ():
                samples[self.model.anchor] = self.model.modalities[name].restore(samples[self.model.anchor], value)
        if set(self.model.generated) - set(samples):
            read = final_read or self.model.anchor in values
            samples |= self._read(samples, plan.channels, levels, generator) if read else draws
        draws = draws if return_last_draws else {}
        check_finite({**samples, **draws})
        samples = {name: self._finish(name, samples[name], output_type) for name in self.model.names if name in samples}
        draws = {name: self._finish(name, value, output_type) for name, value in draws.items()}
        weights = weights_of(self.model, values)
        return MTDiffusionPipelineOutput(samples, draws, weights) if return_dict else (samples, draws, weights)

    def _denoise(
        self,
        values: dict[str, Tensor],
        count: int,
        num_inference_steps: int,
        plan: Conditioning,
        feedback: str | None,
        generator: Generators,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(z_0, draws of the last step). One reverse step: heads → encodings → the solver on u = z − c → + c."""
        model, scheduler = self.model, self.scheduler
        feedback = feedback_for(feedback, scheduler.is_stochastic)
        unknown, fed = sorted(set(model.generated) - set(values)), sorted(plan.fed)
        scheduler.set_timesteps(num_inference_steps, device=model.device, constant_encodings=not (fed or plan.known))
        plugged = model.encode({name: values[name] for name in sorted(plan.plugged)})
        randn = self._noise(count, generator)
        z_t, encodings, drawn = randn(model.space), dict(plugged), {}
        told = branches(model, values, plan.aggregated, plan.channels, plan.left_out, like=z_t)
        times, timesteps = scheduler.steps, [t.expand(count) for t in scheduler.timesteps]
        schedule = visits(num_inference_steps, *(plan.resampling if plan.known else (1, 1)))
        if plan.known:
            z_t = replaced(scheduler, z_t, times[0], plan.known.values(), encodings, randn(model.space))
        for index, back in self.progress_bar(schedule):
            found = steered(model, scheduler, z_t, timesteps[index], times[index], told, plan, values, plugged)
            last = index == num_inference_steps - 1
            drawn = {
                name: self._draw(name, found.params[name], randn)
                for name in (unknown if last else fed if feedback == "draw" else ())
            }
            for name in fed:
                encodings[name] = fed_encoding(model.modalities[name], found.params[name], feedback, drawn.get(name))
            z_t = scheduler.step(
                found.prediction, times[index], z_t, encodings, generator=generator, return_dict=False
            )[0]
            if plan.known:
                z_t = replaced(scheduler, z_t, times[index + 1], plan.known.values(), encodings, randn(model.space))
            if back:
                z_t = renoised(scheduler, z_t, times[index + 1], times[index + 1 - back], encodings, randn(model.space))
                scheduler.rewind(back)
        return z_t, drawn

    def _read(
        self, values: dict[str, Tensor], channels: frozenset[str], levels: tuple[int, ...] | None, generator: Generators
    ) -> dict[str, Tensor]:
        """Modes of all unobserved auxiliary modalities given the anchor and what else is shown to the network."""
        model = self.model
        if levels is None:
            params = heads(model, self.scheduler, values, channels | {model.anchor})
        else:
            randn = self._noise(len(values[model.anchor]), generator)
            noises = (randn(model.space) for _ in levels)
            params = heads_of_noised_anchor(model, self.scheduler, values, channels, levels, noises)
        return {name: model.modalities[name].mode(found) for name, found in params.items() if name not in values}

    def _read_hidden_anchor(self, values: dict[str, Tensor], channels: frozenset[str]) -> dict[str, Tensor]:
        """The same, and the anchor from the head of an observed modality that predicts it."""
        modalities = self.model.modalities
        able = [name for name in sorted(channels) if modalities[name].predicts_anchor]
        if not able:
            raise InputError("num_inference_steps", 0, "needs an observed modality whose head predicts the anchor")
        params = heads(self.model, self.scheduler, values, channels)
        read = {name: modalities[name].mode(found) for name, found in params.items() if name not in values}
        return {**read, self.model.anchor: modalities[able[0]].anchor_mode(params[able[0]])}

    def _draw(self, name: str, params: Tensor, randn: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        modality: Modality = self.model.modalities[name]
        return modality.sample(params, randn(modality.noise_shape))

    def _noise(self, count: int, generator: Generators) -> Callable[[tuple[int, ...]], Tensor]:
        """shape -> standard normal noise (count, *shape). What it needs is looked up once: diffusers searches all
        modules for its offloading hooks whenever a model is asked for its device."""
        if isinstance(generator, list) and len(generator) == 1:
            generator = generator[0]
        device, dtype = self.model.device, self.model.value_dtype
        return lambda shape: randn_tensor((count, *shape), generator=generator, device=device, dtype=dtype)

    def peak_weights(self) -> dict[str, float]:
        """{modality: max_t W_t}."""
        weights = self.scheduler.config.weights or {}
        return {name: float(self.scheduler.cumulative_weights(name).detach().max()) for name in weights}

    def _finish(self, name: str, value: Tensor, output_type: str) -> Any:
        return value if output_type == "pt" else self.model.modalities[name].postprocess(value)


diffusers.MTDiffusionPipeline = MTDiffusionPipeline  # `DiffusionPipeline.from_pretrained` looks classes up there

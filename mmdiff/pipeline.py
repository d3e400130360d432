"""Sampling: any subset of the modalities in, the rest out."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from mmdiff.lora import LoraPipeline
from mmdiff.modalities.autoencoder import load_autoencoder
from mmdiff.model import MTDiffusionModel, complete
from mmdiff.sampling.arguments import check_finite, memory_errors
from mmdiff.sampling.components import HUB_ARGUMENTS, check_components, check_together, read_index
from mmdiff.sampling.conditioning import Methods, peak_weights
from mmdiff.sampling.heads import read_anchor, read_hidden_anchor
from mmdiff.sampling.observed import weights_of
from mmdiff.sampling.phases import DENOISE, Order
from mmdiff.sampling.request import Generators, Request, request_of
from mmdiff.sampling.run import Run, pasted
from mmdiff.schedulers import SCHEDULERS, MTScheduler, as_ours
from mmdiff.trust import check_links, damage
from mmdiff.values import check_names, dtypes, in_dtype, switch


@dataclass
class MTDiffusionPipelineOutput(BaseOutput):
    """``samples`` {modality: list of what a person wants, or tensor}; ``last_draws`` {unobserved auxiliary: values
    drawn from the heads in the last denoising step}, empty unless asked for and where nothing was denoised; ``weights``
    {observed modality of several parts, such as a set of images: how much each part matters (B, n)}.

    A modality that only conditions is in ``samples`` where it was observed."""

    samples: dict[str, Any]
    last_draws: dict[str, Any]
    weights: dict[str, Tensor]


class MTDiffusionPipeline(LoraPipeline, DiffusionPipeline):
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
        self, model: MTDiffusionModel, scheduler: MTScheduler, autoencoder: ModelMixin | None = None
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
        autoencoder: ModelMixin | None = None,
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
            own = kind.from_pretrained(path, subfolder="scheduler", **kwargs)
            scheduler = own if scheduler is None else as_ours(scheduler, own)
        if autoencoder is None and index.get("autoencoder", [None])[0] is not None:
            with damage("autoencoder", path):
                own = load_autoencoder(path, subfolder="autoencoder", use_safetensors=True, **kwargs)
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
        conditioning: Methods | Mapping[str, Methods] | None = None,
        head_guidance_scale: float | Mapping[str, float] = 1.0,
        resampling: tuple[int, int] = (2, 5),
        read_timesteps: Sequence[int] | None = None,
        order: Order | None = None,
        read: str | None = None,
        read_steps: int | None = None,
        aggregate: bool | Iterable[str] | None = None,
        feedback: str | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        paste_back: bool = True,
        final_read: bool = True,
        return_last_draws: bool = False,
        max_batch_size: int | None = None,
        height: int | None = None,
        width: int | None = None,
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
            conditioning: how observed values steer (docs/theory.md, section 5): one or several of "concatenation",
                "aggregation", "head-guidance" and "replacement" for all, or {modality: one or several}; by default as
                trained: observation channels, and c_t for what is aggregated.
            head_guidance_scale: of "head-guidance", one number or {modality: number}; 1 is exact for exact heads.
            resampling: of "replacement", RePaint's (jump_length, jump_n_sample), its own choice being (10, 10) for 250
                steps; (1, 1) takes every step once.
            read_timesteps: read the heads from the anchor noised to these timesteps, one evaluation each, and average
                their distributions; by default one evaluation, the anchor in its observation channels (where training
                never showed it there: unnoised, at timestep 0).
            order: in which order the anchor and diffused modalities are denoised: "anchor_first" (default; the diffused
                follow together), "together", or a list of phases, each a name or several: ["mask", ["image", "depth"]].
            read: how unobserved modalities are read from the anchor: "mode" or "draw" of the heads in one evaluation,
                or "denoise", by their own reverse process, where they are diffused; the default where they are.
            read_steps: solver steps of a phase without the anchor, one evaluation each, and one more per guided
                modality; by default num_inference_steps.
            aggregate: which modalities take part in c_t: True (default: all with weights), False, or names.
            feedback: how unknown aggregated modalities are fed back: "draw", "mean" or "mode"; by default "draw" for
                stochastic and "mean" for deterministic solvers.
            generator: one, or a list of one per sample, with which results do not depend on the batch's split. One
                is drawn from batch by batch: another split gives other samples of the same distribution.
            output_type: "pil" (what a person wants) or "pt" (tensors: images in [−1, 1], class ids).
            paste_back: put what observed values fix of the anchor (known pixels) back into it; False: as it was drawn.
            final_read: read unobserved modalities from the finished anchor in one more evaluation; False returns the
                draws of the last denoising step.
            return_last_draws: report those draws beside the final read.
            max_batch_size: how many samples are computed at once; guidance evaluates them once more for each modality.
            height, width: of the anchor's values in pixels, by default those that the model was trained at. Observed
                images and maps are read at this size.
            return_dict: False returns the tuple (samples, last_draws, weights).

        Raises:
            InputError: naming the argument, the value and the remedy.
        """
        return_dict = switch("return_dict", return_dict)
        batches = list(request_of(self.model, self.scheduler, locals()).batches())
        output = self._sample(batches[0], self.progress_bar) if len(batches) == 1 else self._sample_all(batches)
        return output if return_dict else (output.samples, output.last_draws, output.weights)

    def _sample_all(self, batches: list[Request]) -> MTDiffusionPipelineOutput:
        """Several batches under one progress bar, which counts samples."""
        outputs = []
        with self.progress_bar(total=sum(batch.count for batch in batches)) as bar:
            for batch in batches:
                outputs.append(self._sample(batch, iter))
                bar.update(batch.count)
        samples, draws, weights = (
            {name: _joined([output[part][name] for output in outputs]) for name in outputs[0][part]}
            for part in ("samples", "last_draws", "weights")
        )
        return MTDiffusionPipelineOutput(samples, draws, weights)

    def _sample(self, request: Request, progress: Callable[[list], Iterable]) -> MTDiffusionPipelineOutput:
        """One batch."""
        model, values = request.model, request.values
        if model.anchor not in values and request.steps == 0:
            samples, draws = values | read_hidden_anchor(model, self.scheduler, request), {}
            samples[model.anchor] = pasted(model, request, samples[model.anchor])
        else:
            samples, draws = self._denoise(request, progress)
        if set(model.generated) - set(samples):
            read = request.final_read or model.anchor in values
            samples |= read_anchor(model, self.scheduler, request, samples) if read else draws
        draws = draws if request.return_last_draws else {}
        check_finite({**samples, **draws})
        samples = {name: self._finish(name, samples[name], request) for name in model.names if name in samples}
        draws = {name: self._finish(name, value, request) for name, value in draws.items()}
        return MTDiffusionPipelineOutput(samples, draws, weights_of(model, values, request.conditioning.concatenated))

    def _denoise(
        self, request: Request, progress: Callable[[list], Iterable]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """({modality: value} of what is observed or denoised, draws of the anchor's last step)."""
        run = Run(request.model, self.scheduler, request)
        for step in progress(run.steps) if run.steps else ():
            run(*step)
        if request.phases.read == DENOISE:
            return run.values, run.draws
        kept = {*request.values, request.model.anchor}  # the rest is read from the anchor
        return {name: value for name, value in run.values.items() if name in kept}, run.draws

    def _finish(self, name: str, value: Tensor, request: Request) -> Any:
        return value if request.output_type == "pt" else self.model.modalities[name].postprocess(value)

    def peak_weights(self) -> dict[str, float]:
        """{modality: max_t W_t}."""
        return peak_weights(self.scheduler)


def _joined(parts: list[Any]) -> Any:
    """Tensors, or lists of what a person wants, as one."""
    return torch.cat(parts) if isinstance(parts[0], Tensor) else [one for part in parts for one in part]


diffusers.MTDiffusionPipeline = MTDiffusionPipeline  # `DiffusionPipeline.from_pretrained` looks classes up there

"""What people pass to the pipeline: taken in every usual form, refused in one line where it makes no sense."""

from __future__ import annotations

import copy
import itertools
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from networks import random_model
from refusals import refused
from torch import Generator, Tensor

from mmdiff.errors import InputError
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTDiffusionScheduler, MTFlowMatchScheduler

T, CLASSES, DIM = 20, 3, 4
WEIGHTS = "model/diffusion_pytorch_model.safetensors"
VECTOR = [0.1, 0.2, -0.3, 0.4]


def build(scheduler: type = MTDiffusionScheduler, **settings: Any) -> MTDiffusionPipeline:
    kinds = {
        "image": {"kind": "image", "channels": 1, "size": 8},
        "label": {"kind": "label", "num_classes": CLASSES},
        "embedding": {"kind": "embedding", "dim": DIM},
    }
    weights = {"label": {"schedule": "bump", "scale": 0.5}}
    pipe = MTDiffusionPipeline(model=random_model(kinds), scheduler=scheduler(T, weights=weights, **settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> MTDiffusionPipeline:
    return build()


def sample(pipe: MTDiffusionPipeline, **arguments: Any) -> dict[str, Tensor]:
    settings = {"num_inference_steps": 2, "generator": Generator().manual_seed(0), "output_type": "pt"}
    return pipe(**{**settings, **arguments}).samples


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


ALIKE = [
    ({"observed": {"label": 1}}, {"observed": {"label": np.int64(1)}}),
    ({"observed": {"label": 1}}, {"observed": {"label": torch.tensor(1)}}),
    ({"observed": {"label": [1, 2]}}, {"observed": {"label": np.array([1, 2])}}),
    ({"observed": {"label": [1, 2]}}, {"observed": {"label": torch.tensor([1, 2], dtype=torch.int32)}}),
    ({"observed": {"label": [1, 2]}}, {"observed": {"label": [torch.tensor(1), torch.tensor(2)]}}),
    ({"observed": {"embedding": np.array(VECTOR)}}, {"observed": {"embedding": VECTOR}}),
    ({"observed": {"embedding": np.array(VECTOR)}}, {"observed": {"embedding": np.array([VECTOR])}}),
    ({"observed": {"embedding": [VECTOR, VECTOR]}}, {"observed": {"embedding": np.array([VECTOR, VECTOR])}}),
    (
        {"observed": {"label": 1}, "guidance_scale": 2.0},
        {"observed": {"label": 1}, "guidance_scale": np.float32(2)},
    ),
    ({"num_inference_steps": 3}, {"num_inference_steps": np.int64(3)}),
    ({"aggregate": ["label"]}, {"aggregate": np.array(["label"])}),
    ({"aggregate": False}, {"aggregate": np.bool_(False)}),
    ({"head_guidance_scale": 2.5}, {"head_guidance_scale": Decimal("2.5")}),
    (
        {"observed": {"image": np.zeros((8, 8), np.uint8)}},
        {"observed": {"image": np.zeros((8, 8, 1), np.uint8)}},
    ),
    ({"batch_size": 2}, {"batch_size": np.int32(2)}),
]


def test_numbers_of_numpy_and_torch_are_numbers(pipe: MTDiffusionPipeline) -> None:
    for plain, other in ALIKE:
        assert same(sample(pipe, **plain), sample(pipe, **other))


def test_generators_may_be_a_tuple(pipe: MTDiffusionPipeline) -> None:
    found = [
        sample(pipe, batch_size=2, generator=kind(Generator().manual_seed(k) for k in (0, 1))) for kind in (list, tuple)
    ]
    assert same(*found)


NAN, INF = float("nan"), float("inf")
ITSELF: list[Any] = []
ITSELF.append(ITSELF)


class Unnamed:
    """What cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError


NONSENSE = [
    ({"guidance_scale": NAN}, "guidance_scale"),
    ({"guidance_scale": {"label": INF}, "observed": {"label": 1}}, "guidance_scale.label"),
    ({"guidance_scale": -1.0}, "guidance_scale"),
    ({"guidance_scale": "2"}, "guidance_scale"),
    ({"head_guidance_scale": NAN}, "head_guidance_scale"),
    ({"num_inference_steps": True}, "num_inference_steps"),
    ({"num_inference_steps": 2.5}, "num_inference_steps"),
    ({"num_inference_steps": None}, "num_inference_steps"),
    ({"batch_size": 2.0}, "batch_size"),
    ({"batch_size": True}, "batch_size"),
    ({"max_batch_size": "all"}, "max_batch_size"),
    ({"read_timesteps": [NAN]}, "read_timesteps"),
    ({"resampling": (INF, 1)}, "resampling"),
    ({"generator": 3}, "generator"),
    ({"generator": [1, 2], "batch_size": 2}, "generator"),
    ({"observed": {"image": torch.full((1, 1, 8, 8), NAN)}}, "observed.image"),
    ({"observed": {"image": torch.full((1, 1, 8, 8), 255.0)}}, "observed.image"),
    ({"observed": {"image": torch.full((1, 1, 8, 8), -1.5)}}, "observed.image"),
    ({"observed": {"embedding": [NAN, 0.0, 1.0, 2.0]}}, "observed.embedding"),
    ({"observed": {"embedding": torch.full((1, DIM), INF)}}, "observed.embedding"),
    ({"observed": {"embedding": [VECTOR, VECTOR[:2]]}}, "observed.embedding"),
    ({"observed": {"embedding": np.zeros((2, 0))}}, "observed.embedding"),
    ({"observed": {"label": torch.tensor([True])}}, "observed.label"),
    ({"observed": {"label": np.array([])}}, "observed.label"),
    ({"observed": {"label": None}}, "observed.label"),
    ({"observed": {"label": {"id": 1}}}, "observed.label"),
    ({"observed": {"label": torch.zeros(0, dtype=torch.long)}}, "observed.label"),
    ({"observed": {"label": torch.zeros(2, dtype=torch.long, device="meta")}}, "observed.label"),
    ({"observed": {"label": torch.tensor([1]).to_sparse()}}, "observed.label"),
    ({"observed": {"image": torch.zeros(0, 1, 8, 8)}}, "observed.image"),
    ({"observed": {"image": np.zeros((8, 8, 5), np.uint8)}}, "observed.image"),
    ({"observed": []}, "observed"),
    ({"read_timesteps": [True]}, "read_timesteps"),
    ({"read_timesteps": {1: 2}}, "read_timesteps"),
    ({"resampling": (True, True)}, "resampling"),
    ({"paste_back": "no"}, "paste_back"),
    ({"final_read": None}, "final_read"),
    ({"return_last_draws": 2}, "return_last_draws"),
    ({"return_dict": "no"}, "return_dict"),
    ({"batch_size": torch.empty((), device="meta")}, "batch_size"),
    ({"batch_size": Unnamed()}, "batch_size"),
    ({"batch_size": 2**30}, "batch_size"),
    ({"num_inference_steps": ITSELF}, "num_inference_steps"),
    ({"guidance_scale": {1: 2.0, "label": 3.0}}, "guidance_scale"),
    ({"conditioning": np.array(None)}, "conditioning"),
    ({"conditioning": torch.tensor(1)}, "conditioning"),
    ({"conditioning": [["channels"]], "observed": {"label": 1}}, "conditioning"),
    ({"aggregate": {"label": False}}, "aggregate"),
    ({"aggregate": [["label"]]}, "aggregate"),
    ({"aggregate": ["x", 1]}, "aggregate"),
    ({"feedback": np.array(["draw", "mean"])}, "feedback"),
    ({"output_type": np.array(["pil", "pt"])}, "output_type"),
    ({"resampling": (1, 10**9)}, "resampling"),
    ({"observed": {"image": torch.zeros(1, 1, 8, 8).to(torch.float8_e4m3fn)}}, "observed.image"),
    ({"observed": {"embedding": ITSELF}}, "observed.embedding"),
]


def test_nonsense_is_refused_by_name(pipe: MTDiffusionPipeline) -> None:
    for arguments, key in NONSENSE:
        with refused(key):
            sample(pipe, **arguments)


def test_the_range_of_a_tensor_is_named(pipe: MTDiffusionPipeline) -> None:
    with refused("observed.image", "0 … 255"):
        sample(pipe, observed={"image": torch.arange(64.0).reshape(1, 1, 8, 8) / 63 * 255})


def test_samples_that_are_not_finite_are_never_returned() -> None:
    pipe = build()
    next(iter(pipe.model.backbone.parameters())).data.fill_(NAN)
    with refused("samples.image", "NaN or infinity"):
        sample(pipe)


# ------------------------------------------------------------------------------------------------ idioms of diffusers


def test_a_scheduler_of_diffusers_becomes_ours_with_that_solver() -> None:
    pipe = build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler = build(solver="DDIMScheduler").scheduler
    expected = MTDiffusionPipeline(model=pipe.model, scheduler=scheduler)
    assert same(sample(pipe), sample(expected)) and pipe.scheduler.config.weights == expected.scheduler.config.weights
    arguments = {"algorithm_type": "sde-dpmsolver++"}
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **arguments)
    assert pipe.scheduler.is_stochastic and pipe.scheduler.config.solver == "DPMSolverMultistepScheduler"


def test_a_solver_that_does_not_fit_is_one_line_and_changes_nothing() -> None:
    for kind in [MTDiffusionScheduler, MTFlowMatchScheduler]:
        pipe = build(kind)
        before = pipe.scheduler
        for other in (diffusers.EulerDiscreteScheduler(), diffusers.PNDMScheduler()):
            with refused("solver", type(other).__name__):
                pipe.scheduler = other
        for component in ("scheduler", "model"):
            for other in (None, 3, "DDIMScheduler", object(), diffusers.DDIMScheduler):
                with refused(component):
                    setattr(pipe, component, other)
        assert pipe.scheduler is before
        with refused("scheduler", "DDIMScheduler"):
            MTDiffusionPipeline(model=pipe.model, scheduler=diffusers.DDIMScheduler())


SWAPPED = [
    ({"use_karras_sigmas": True}, "solver_config.use_karras_sigmas"),
    ({"thresholding": True}, "solver_config.thresholding"),
    ({"lambda_min_clipped": -5.1}, "solver_config.lambda_min_clipped"),
    ({"prediction_type": "epsilon"}, "scheduler.prediction_type"),
    ({"beta_schedule": "linear"}, "scheduler.beta_schedule"),
    ({"num_train_timesteps": 1000}, "scheduler.num_train_timesteps"),
]


def test_what_a_swapped_scheduler_says_is_obeyed_or_refused() -> None:
    for arguments, key in SWAPPED:
        pipe, kind = build(), diffusers.DPMSolverMultistepScheduler
        pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="leading")
        assert pipe.scheduler.config.timestep_spacing == "leading"
        with refused(key):
            pipe.scheduler = kind.from_config(pipe.scheduler.config, **arguments)


def test_the_flow_settings_of_diffusers_are_ours() -> None:
    pipe = build(MTFlowMatchScheduler)
    given = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, **given)
    assert pipe.scheduler.config.solver_config == {"flow_shift": 3.0}


def test_a_solver_is_the_class_of_diffusers_and_arguments_have_known_names() -> None:
    pipe = build()
    other = type("DDIMScheduler", (diffusers.DDIMScheduler,), {}).from_config(pipe.scheduler.config)
    with refused("scheduler"):
        pipe.scheduler = other
    with refused("solvr", "DDIMScheduler"):
        type(pipe.scheduler).from_config(pipe.scheduler.config, solvr="DDIMScheduler")


def test_a_modality_with_weights_is_one_of_the_model() -> None:
    pipe = build()
    for name in ("nothing", "image"):
        scheduler = MTDiffusionScheduler(T, weights={name: {"schedule": "bump"}})
        with refused(f"weights.{name}"):
            MTDiffusionPipeline(model=pipe.model, scheduler=scheduler)
        with refused(f"weights.{name}"):
            pipe.scheduler = scheduler


def test_a_folder_without_a_pipeline_is_one_line(tmp_path: Path) -> None:
    for path in [None, 3, ["x"], "nowhere/at-all", "./nowhere"]:
        for place in (path, tmp_path):
            with refused("pipeline"):
                MTDiffusionPipeline.from_pretrained(place)


DAMAGE = [None, "", "{", "[]", "3", '"a/b"', "{}", '{"modality_config": 3, "backbone_config": {}}']


def test_a_damaged_folder_is_one_line(pipe: MTDiffusionPipeline, tmp_path: Path) -> None:
    for text, file in itertools.product(
        DAMAGE, ["model_index.json", "model/config.json", "scheduler/scheduler_config.json", WEIGHTS]
    ):
        pipe.save_pretrained(tmp_path)
        (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
        if file.startswith("scheduler") and text is not None and text.startswith("{") and text != "{":
            continue  # its defaults
        with pytest.raises(InputError) as refusal:
            MTDiffusionPipeline.from_pretrained(tmp_path)
        assert "\n" not in str(refusal.value) and "onnect" not in str(refusal.value)


def test_components_are_used_and_unknown_arguments_refused(tmp_path: Path, pipe: MTDiffusionPipeline) -> None:
    pipe.save_pretrained(tmp_path)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, solver="DDIMScheduler")
    loaded = MTDiffusionPipeline.from_pretrained(tmp_path, scheduler=scheduler, model=pipe.model)
    assert loaded.scheduler is scheduler and loaded.model is pipe.model
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    loaded = MTDiffusionPipeline.from_pretrained(tmp_path, scheduler=theirs)
    assert loaded.scheduler.config.solver == "DDIMScheduler"
    for component in ("model", "autoencoder", "scheduler"):
        with pytest.raises(InputError):
            MTDiffusionPipeline.from_pretrained(tmp_path, **{component: "DDIMScheduler"})
    for name in ("schedular", "safety_checker", "trust_remote_code"):
        with refused(name, True):
            MTDiffusionPipeline.from_pretrained(tmp_path, **{name: True})
    generic = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    generic.set_progress_bar_config(disable=True)
    assert type(generic) is MTDiffusionPipeline and same(sample(generic), sample(pipe))


DTYPES = [
    (torch.float16, torch.float16),
    ("float16", torch.float16),
    ("bf16", torch.bfloat16),
    ("auto", torch.float32),
    ({"default": "float16"}, torch.float16),
    ({"model": torch.bfloat16}, torch.bfloat16),
    (None, torch.float32),
    ({"autoencoder": "fp16"}, torch.float32),
]


def test_every_way_to_name_a_dtype(tmp_path: Path, pipe: Any) -> None:
    for name, (given, expected) in itertools.product(["torch_dtype", "dtype"], DTYPES):
        pipe.save_pretrained(tmp_path)
        loaded = MTDiffusionPipeline.from_pretrained(tmp_path, **{name: given})
        assert next(loaded.model.backbone.parameters()).dtype == expected
        assert torch.get_default_dtype() == torch.float32


def test_what_is_no_dtype_is_one_line_and_the_default_stays(tmp_path: Path, pipe: Any) -> None:
    for given in ["int8", torch.int32, 16, {"unet": "float16"}, "fast"]:
        pipe.save_pretrained(tmp_path)
        with refused("torch_dtype.unet" if isinstance(given, dict) else "torch_dtype"):
            MTDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=given)
        assert torch.get_default_dtype() == torch.float32


def test_a_pipeline_pickles_and_copies(pipe: MTDiffusionPipeline) -> None:
    for copied in [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy]:
        assert same(sample(copied(pipe)), sample(pipe))


def test_a_tuple_loses_nothing(pipe: MTDiffusionPipeline) -> None:
    settings = {"batch_size": 2, "num_inference_steps": 2, "output_type": "pt", "return_last_draws": True}
    output = pipe(**settings, generator=Generator().manual_seed(0))
    as_tuple = pipe(**settings, generator=Generator().manual_seed(0), return_dict=False)
    assert len(as_tuple) == len(output) and same(as_tuple[0], output.samples) and same(as_tuple[1], output.last_draws)

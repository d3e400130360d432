"""mmdiff's side: the experiment, trained for some CPU time."""

from __future__ import annotations

import time
from typing import Any

from accelerate.utils import patch_environment

from mmdiff.benchmarks.coherence.scores import Images
from mmdiff.benchmarks.coherence.sides import Budget, Task
from mmdiff.benchmarks.training import steps
from mmdiff.build import Experiment, build_model, build_objective, build_scheduler
from mmdiff.config import SampleConfig
from mmdiff.evaluation.draws import draw
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.training.process import make_accelerator, set_threads
from mmdiff.training.trainer import Trainer


class Ours:
    """The averaged weights."""

    def __init__(self, pipeline: MTDiffusionPipeline, sample: SampleConfig, facts: dict[str, Any]) -> None:
        self.pipeline, self.sample, self.facts = pipeline, sample, facts

    def joint(self, count: int, seed: int) -> Images:
        return self._drawn(count, seed, {})

    def rest(self, given: Images, seed: int) -> Images:
        drawn = self._drawn(len(next(iter(given.values()))), seed, given)
        return {name: values for name, values in drawn.items() if name not in given}

    def _drawn(self, count: int, seed: int, given: Images) -> Images:
        settings = {"num_inference_steps": self.sample.steps, **self.sample.phases()}
        guidable = set(given) & set(self.pipeline.model.observable) - {self.pipeline.model.anchor}
        settings["guidance_scale"] = self.sample.scales(guidable)
        drawn = draw(self.pipeline, count, self.sample.batch_size, seed, observed=given, **settings)
        return {name: drawn[name].clamp(-1, 1) for name in self.pipeline.model.names}


def train_ours(task: Task, budget: Budget) -> Ours:
    """See `mmdiff.benchmarks.coherence.sides.Side`."""
    settings = task.config.train
    rate = budget.factor * settings.learning_rate
    train = settings.model_copy(update={"seed": budget.seed, "learning_rate": rate})
    config = task.config.model_copy(update={"train": train})
    set_threads(train.threads)
    model, scheduler = build_model(config), build_scheduler(config)
    objective = build_objective(config, model, scheduler)
    experiment = Experiment(config, task.table, task.table, model, scheduler, objective)
    with patch_environment(accelerate_use_cpu="1"):  # time of an accelerator would not count
        trainer = Trainer(experiment, make_accelerator(train))
    started = time.process_time()
    count = sum(1 for _ in steps(trainer, budget.seconds))
    facts = {"steps": count, "CPU seconds": time.process_time() - started, "learning rate": rate}
    facts |= {"parameters": sum(p.numel() for p in model.parameters()), "batch size": train.batch_size}
    pipeline = trainer.whole_pipeline({**trainer.bare.state_dict(), **trainer.ema.averages})
    return Ours(pipeline, config.sample, facts)

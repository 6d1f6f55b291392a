"""Measures the memory and the time of a run by taking a few steps."""

import math
import time
from functools import partial
from itertools import islice

import mlx.core as mx
import numpy as np

from .. import events
from ..config import TrainConfig
from ..data import Dataset, batches
from ..data.sources import sources_of
from ..hub import located
from .cycle import Cycle, rewards_of
from .policy import run_policy
from .results import ProbeResult
from .setup import prepare, read_inputs
from .step import Halted, Stepper


def _longest(config: TrainConfig, data: Dataset) -> Dataset:
    """Returns the longest rows of the data, as many as a step trains on."""
    longest = np.argsort(-data.columns.run, kind="stable")
    count = config.batch_size * config.grad_accumulation_steps
    if data.packed:  # enough rows to fill a step's batches
        tokens = np.cumsum(data.columns.run[longest])
        count = 1 + int(np.searchsorted(tokens, count * data.packed))
    return data.take(longest[:count])


def probe(config: TrainConfig, on_event: events.OnEvent | None = None) -> ProbeResult:
    """Takes two steps on the longest rows of the data, measures their memory and time, and checks
    that losses and gradients are finite. Writes no files. Raises InputError if an input cannot be
    used."""
    tell = on_event or (lambda event: None)
    with run_policy(config):
        config = located(config, tell)
        scoring = rewards_of(config)
        sources = sources_of(config.data_dir, tell=tell)
        inputs = read_inputs(config, sources, tell, rewards=scoring)
        setup, vector = prepare(inputs, tell, pick=partial(_longest, inputs.config))
        config = setup.config
        source = batches(setup.train, config.batch_size, config.seed)
        step = Stepper(setup) if scoring is None else Cycle(setup, rewards=scoring)
        at = step.optimizer.start(vector)
        del vector
        with setup.plan.limits():
            resting = mx.get_active_memory()
            mx.reset_peak_memory()
            times, loss, norm, tokens, finite = [], math.nan, math.nan, 0, True
            for _ in range(2):
                accumulated = list(islice(source, config.grad_accumulation_steps))
                started = time.perf_counter()
                try:
                    at, outcome = step.take(at, accumulated, step, lambda part: part())
                    loss, norm, tokens = outcome.loss, outcome.norm, outcome.tokens
                except Halted:
                    finite = False
                times.append(time.perf_counter() - started)
    return ProbeResult(
        step_s=times[1],
        first_step_s=times[0],
        peak_gb=mx.get_peak_memory() / 1e9,
        planned_gb=setup.plan.planned.peak / 1e9 if setup.plan.planned else None,
        resting_gb=resting / 1e9,
        loss=loss,
        grad_norm=norm,
        finite=finite,
        tokens=tokens,
    )

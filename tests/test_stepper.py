"""The compiled steps of a training: in a loop, or one by one where loops are slow."""

import re

import jax
import numpy as np
import pytest

from configs import emm_cifar
from memsep_jax import parallel
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import stepper, training_run

# The order of dimensions of XLA's fast convolution: it is slow with any other.
FAST = "b01f_01io->b01f"


def orders(lowered):
    """The orders of dimensions of all convolutions of a program."""
    text = lowered.compile().as_text()
    return set(re.findall(r" convolution\(.*dim_labels=([^,\s]+)", text))


@pytest.fixture(scope="module")
def unet():
    """A config of a U-Net, its parts and its first state."""
    config = emm_cifar.get_config("smoke")
    config.model.update(width=8, depth=1, multipliers=(1,), attention=())
    config.train.accumulate = 2
    parts = build.build(config)
    return config, parts, training_run.initial_state(config, parts)


def test_no_gradient_of_a_convolution_is_in_a_loop_on_a_cpu(unet):
    config, parts, state = unet
    mesh = parallel.make_mesh(jax.devices()[:1])
    steps = jax.jit(training.make_steps(config, parts, mesh))
    rows = training.order(config, len(parts.splits.train.x))(0)[None]
    program = steps.lower(state, parts.splits.train, rows, 0, 1)
    assert orders(program) == {FAST}
    # A state that is not at the step of the rows was refused, and stays.
    same, metrics = program.compile()(state, parts.splits.train, rows, 3, 1)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    assert metrics["step"] == 0


@pytest.mark.slow
def test_a_call_takes_one_step_of_a_convolutional_network_on_a_cpu(unet):
    config, parts, state = unet
    mesh = parallel.make_mesh(jax.devices()[:1])
    state, take, most = stepper.compiled(config, parts, mesh, state)
    assert most == 1
    state, metrics = take(state, 0, 1)
    assert metrics["step"] == 1 and np.isfinite(metrics["loss"])

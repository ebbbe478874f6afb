"""What must fit together in a config, one function for each; `build` calls them all.

Each raises a ValueError with a line for everything that must change.
"""

import jax
import jax.numpy as jnp

from memsep_jax import prune, sampling
from memsep_jax.experiments.config import schema
from memsep_jax.experiments.config.construct import ConfigError, naming

STOPS = [name.removeprefix("train.") for name in schema.marked(schema.STOPS)]
EPOCHS = ("epochs", "warmup_epochs")
# Experiments that train networks together, with one loss and one number of steps.
TOGETHER = ("band_swap", "capacity", "ensemble", "lipschitz")


def reach(made_process, times, law, config):
    """Times at which the process has no score: alpha = 0, or past its end."""
    looked_at = {"sampler.t_min": times[-1], "sampler.t_max": times[0]}
    if config.train.ambient is not None:
        looked_at["train.ambient"] = jnp.float32(config.train.ambient)
    if law is not None:
        looked_at |= late(law)
    inside(made_process, config.process.name, looked_at)


def late(law):
    """About the largest time that a law draws."""
    drawn = jax.jit(jax.vmap(law))(jax.random.split(jax.random.key(0), 1_000))
    return {"the largest of 1,000 draws of times, t": jnp.max(drawn)}


def inside(made, name, looked_at):
    """Whether a process has a score at some times: {"what": t []}."""
    wrong = [
        f"{what}={float(t):.4g} is outside of process {name}, where alpha is "
        f"{float(made.alpha(t)):.4g} and sigma {float(made.sigma(t)):.4g}: both must "
        "be positive"
        for what, t in looked_at.items()
        if not (made.alpha(t) > 0 and made.sigma(t) > 0)
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def lengths(group, optimizer):
    """Fields of `train` that contradict or miss another one."""
    wrong = []
    if group.warmup_epochs is not None and optimizer.get("warmup"):
        wrong.append(
            f"optimizer.warmup={optimizer.warmup} steps and train.warmup_epochs="
            f"{group.warmup_epochs} both give the warm-up; leave one of them out"
        )
    if group.ema_ramp is not None and group.ema_half_life is None:
        wrong.append(
            f"train.ema_ramp={group.ema_ramp} bounds train.ema_half_life, which is not "
            "given: give it, or leave out the ramp"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))


def mitigations(config, splits, num_classes):
    """What works against memorization, and ends training early."""
    group, wrong = config.train, []
    if group.temperature is not None and group.ambient is not None:
        wrong.append(
            f"train.temperature={group.temperature}, train.ambient={group.ambient}: "
            "they give the network two different targets; give one of them"
        )
    if config.get("experiment") in TOGETHER:
        wrong += [
            f"train.{field}={group[field]}: networks that are trained together share "
            "one loss and one number of steps, and draw with replacement; "
            "experiment=train has it"
            for field in ("temperature", *STOPS, *EPOCHS, "order")
            if group[field] not in (None, "reshuffled")
        ]
    held_out = splits and splits.held_out
    if group.stop_gap is not None and splits is not None:
        if held_out is None or not len(held_out.x):
            wrong.append(
                f"train.stop_gap={group.stop_gap} needs held-out data, and there are "
                "none: raise data.num_held_out"
            )
        elif num_classes and held_out.label is None:
            wrong.append(
                f"train.stop_gap={group.stop_gap} compares with held-out points, which "
                f"have no labels under data.labels={config.data.labels}"
            )
    if wrong:
        raise ConfigError("\n".join(wrong))


def stream(config):
    """What needs all training points in memory."""
    needs = {
        f"experiment={config.experiment}": config.experiment != "train",
        f"train.temperature={config.train.temperature}": config.train.temperature,
        f"prune.ratio={config.prune.ratio}": config.prune.ratio,
    }
    if wrong := [name for name, is_so in needs.items() if is_so]:
        raise ValueError(
            f"data.stream=True leaves the training points on disk, and "
            f"{', '.join(wrong)} needs them in memory: leave out one of the two"
        )


def pruning(group, model, shape, num_classes):
    """Whether there is something to prune, where it is asked for."""
    if not group.ratio:
        return
    label = jnp.zeros((), jnp.int32) if num_classes else None
    like = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(()), label
    )
    with naming("prune", group):
        units = prune.gates(like["params"], group.group).size
    if not prune.count(units, group.ratio):
        raise ValueError(
            f"prune.ratio={group.ratio} removes none of {units} {group.group}: give "
            f"at least {1 / units:.3g}"
        )


def batch(config, devices):
    """Whether the devices can share a batch."""
    batch, parts = config.train.batch_size, config.train.accumulate
    if batch >= 1 and parts >= 1 and batch % (devices * parts):
        raise ValueError(
            f"train.batch_size={batch} must be a multiple of {devices} device"
            f"{'s' * (devices > 1)} times train.accumulate={parts}"
        )


def sampler(config, made_process, times):
    """Whether the sampler takes these options and times."""
    options = sampling_options(config)
    with naming("sampler", config.sampler):
        sampling.sampler(lambda x, t: x, made_process, times, (), **options)


def sampling_options(config) -> dict:
    """config.sampler as arguments of `sampling.sampler`."""
    group = config.sampler
    options = {
        field: group[field]
        for field, known in schema.group_fields("sampler").items()
        if known.of and group[field] is not None
    }
    if options and (unread := schema.unread(options, "sampler", group.name)):
        field, value = unread[0], options[unread[0]]
        raise ValueError(
            f"sampler.{field}={value} is an option of sampler.name=edm, and the "
            f"sampler is {group.name}: leave it out, or take edm"
        )
    return {"method": group.name} | options


def two_points(splits):
    """Whether the memorization ratio is defined."""
    if splits is not None and splits.num_distinct < 2:
        raise ValueError(
            "the memorization ratio needs two distinct training points and got "
            f"{splits.num_distinct}: raise data.num_examples, or measure the distance "
            "to the nearest one at the prompt (neighbours.nearest with k=1)"
        )

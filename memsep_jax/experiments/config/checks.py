"""What must fit together in a config, one function for each; `build` calls them all.

Each raises a ValueError with a line for everything that must change.
"""

import jax
import jax.numpy as jnp

from memsep_jax import prune, sampling
from memsep_jax.experiments.config import schema
from memsep_jax.experiments.config.construct import ConfigError, naming
from memsep_jax.models import own

STOPS = [name.removeprefix("train.") for name in schema.marked(schema.STOPS)]
EPOCHS = ("epochs", "warmup_epochs")
# Experiments that train networks together, with one loss and one number of steps. The
# names stand here, as this room may not import studies, and these violations belong in
# the one list with all others.
TOGETHER = ("band_swap", "capacity", "ensemble", "lipschitz")


def reach(made_process, times, law, config):
    """Refuses times at which the process has no score: alpha = 0, or past its end."""
    looked_at = {"sampler.t_min": times[-1], "sampler.t_max": times[0]}
    if config.train.ambient is not None:
        looked_at["train.ambient"] = jnp.float32(config.train.ambient)
    if law is not None:
        looked_at |= late(law)
    inside(made_process, config.process.name, looked_at)


def late(law):
    """The largest time that a law draws, by a sample: {"what": t []}."""
    # A law is a function of a key, a user's too: nothing else is known of its range.
    drawn = jax.jit(jax.vmap(law))(jax.random.split(jax.random.key(0), 1_000))
    return {"the largest of 1,000 draws of times, t": jnp.max(drawn)}


def inside(made, name, looked_at):
    """Refuses times at which a process has no score: {"what": t []}."""
    # Tweedie's formula divides by alpha, and the score by sigma^2.
    wrong = [
        f"{what}={float(t):.4g} is outside of process {name}, where alpha is "
        f"{float(made.alpha(t)):.4g} and sigma {float(made.sigma(t)):.4g}: both must "
        "be positive"
        for what, t in looked_at.items()
        if not (made.alpha(t) > 0 and made.sigma(t) > 0)  # so that nan is refused too
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def lengths(group, optimizer):
    """Refuses fields of `train` that contradict or miss another one."""
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
    """Refuses mitigations and early stops that do not fit each other or the data."""
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


def guidance(config, num_classes):
    """Refuses guidance where the score without a label is not known."""
    factor = config.sampler.guidance
    # The empirical score needs no training to be known without a label.
    free = config.train.label_drop or config.experiment == "optimum"
    if factor is not None and not (num_classes and free):
        raise ConfigError(
            f"sampler.guidance={factor} needs the scores with and without a label: "
            "train with data.labels and --config.train.label_drop=0.1, or leave it out"
        )


def stream(config):
    """Refuses what needs all training points in memory, where they stay on disk."""
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
    """Refuses a pruning that would remove nothing."""
    if not group.ratio:
        return
    if isinstance(model, own.Network) and "gates" not in model.takes:
        raise ValueError(
            f"prune.ratio={group.ratio} closes gates, and the network takes none: give "
            "its call the argument gates and its layers the names that models.DiT has, "
            "or leave prune.ratio at 0"
        )
    label = jnp.zeros((), jnp.int32) if num_classes else None
    # Shapes alone: a large network is not made to count its heads.
    x, t = jnp.zeros(shape), jnp.zeros(())
    like = jax.eval_shape(model.init, jax.random.key(0), x, t, label)

    def sizes(variables):
        _, seen = model.apply(variables, x, t, label, mutable="intermediates")
        return prune.activations(seen.get("intermediates", {}), group.group)

    with naming("prune", group):
        units = prune.gates(like["params"], group.group).size
        if group.criterion == "activation":
            jax.eval_shape(sizes, like)
    if not prune.count(units, group.ratio):
        raise ValueError(
            f"prune.ratio={group.ratio} removes none of {units} {group.group}: give "
            f"at least {1 / units:.3g}"
        )


def batch(config, devices):
    """Refuses a batch that the devices cannot share."""
    batch, parts = config.train.batch_size, config.train.accumulate
    if batch >= 1 and parts >= 1 and batch % (devices * parts):
        raise ValueError(
            f"train.batch_size={batch} must be a multiple of {devices} device"
            f"{'s' * (devices > 1)} times train.accumulate={parts}"
        )


def sampler(config, made_process, times):
    """Refuses options and times that the sampler does not take."""
    options = sampling_options(config)
    # Made for a score that is never called: its own checks are those of a run.
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
    """Refuses data on which the memorization ratio is not defined."""
    if splits is not None and splits.num_distinct < 2:
        raise ValueError(
            "the memorization ratio needs two distinct training points and got "
            f"{splits.num_distinct}: raise data.num_examples, or measure the distance "
            "to the nearest one at the prompt (neighbours.nearest with k=1)"
        )

"""When does a diffusion model copy its training data, why, and what helps?

The map of the house, from the ground up. Every function is written for one point
x [*event] and one time t []; jax.vmap makes the batch.

Below all (jax only):
  memory        freed memory: kept for the next step, or given back (no jax either)
  checks        what must be right before anything is traced or compiled
  roots         square roots and lengths with a derivative at 0
  keys          a branch of a random key that no split and no step can reach
  shapes        types of arrays for annotations, which tests check
Mathematics (jax only):
  process       alpha, sigma and what follows from them; laws of t
  mixture       known truths: Gaussian, low-rank, Student-t, boxes; density, score
  streaming     sums over a training set, chunk by chunk: a product, then differences
  empirical     the noised training set: weights, denoiser, score, density, Jacobian
  analytic      scores between truth and copy: Gaussian, local, equivariant and local,
                local as the covariance says
  score         score_fn(x, t), and how a network's answer becomes one
  gap           denoising loss, Fisher divergence, loss gap, its closed forms, detector
  lipschitz     spectral norm and eigenvalues of a Jacobian, probes between points,
                bounds
  sampling      time grids, probability-flow ODE, reverse SDE, EDM's sampler,
                log-likelihood, and the initial noise that comes closest to a point
  fidelity      quality from feature arrays: Frechet distance and the influence of a
                point on it, precision, recall, KID, density, coverage, Vendi score
  neighbours    the nearest distinct training points, exactly
  memorization  what follows from those distances: ratio (copies, null level,
                intervals), copying (other tests), effective (memorization against n),
                emission (which points come out), reproducibility (of two models);
                and from a score alone: membership (who was in the training set),
                detectors (which samples are copies)
Networks (flax.linen):
  models        MLP, DiT and U-Net, for one example; attention that is the exact score;
                inception and alexnet, which make features; own, a user's network
Learning:
  data          a data set is an array: load, subset, label, duplicate, draw, stream.
                arrays (what they may hold), readers (folders and zips of images),
                archives (.npz, MNIST's format, CIFAR-10, TensorFlow Datasets), sources
                (one function each), subsets (what a run trains on and never sees),
                batches
  train         step (TrainState, one train step), objectives (what a network learns
                to predict), optimizers
  prune         importance -> keep -> mask -> apply or take away: heads, neurons, blocks
  parallel      one mesh over all devices of all processes: batches are split, a state
                may be; processes that train together
  checkpoint    states on disk: whole, verified, and the newest
  weights       safetensors: networks of other projects as ours, and ours for them
  features      images as points: Inception, AlexNet and LPIPS, stand-ins, files
Experiments (the only rooms that read a config): run(config, workdir)
  config        fields and schema declare every field; command, sweep_file and grid turn
                a command line, a file or the axes of a sweep into configs; construct,
                checks and build turn a config into objects; page writes docs/configs.md
  training      config -> loss, step, sampler and score, on one screen
  loaded        a run as an object: `load`, its score, new samples, audit, export
  audited       an audit as an object: `audit`, of arrays, files or a generator
  record        numbers on disk; long work, done and kept in pieces
  runtime       session (one run in one workdir), locks, signals, processes,
                circumstances, cache (of sets that audits share), compiled (programs,
                for the next process), terminal, trackers; points (a grid of points,
                each done once, by whoever takes it), runs (points that are runs of
                their own)
  reporting     figures, tables, verdict (what the numbers mean), report (the pages)
  studies       study says what a study is. One run: training_run (stepper, store,
                monitor, evaluate, pruning, dry_run, unfinished), optimum; audit (of any
                samples, by compare), calibrate (which metric sees which kind of copy).
                Sweeps: loss_gap, steepness, capacity, ensemble (many small networks at
                once), band_swap, mitigate (prune: what helps, and whether it comes
                back), emm (how many points a network copies), factors (what drives it),
                twins (two networks on disjoint halves), onset (when it begins), which
                (points are copied first), membership (who was trained on), detect
                (copies, from the score alone), explain (a network by the scores between
                truth and copy); they share networks (trained once for all points),
                results and overview
  defaults      the presets that a file in configs/ starts from
  commands      train, sample, audit, report, configs and sweep, by these words
  main          the command line
The modules memsep_jax.sources and memsep_jax.readers repeat names of rooms of data, for
scripts that look for them here.
"""

import importlib

__version__ = "0.1.0"
__all__ = [
    "analytic", "audit", "checkpoint", "data", "defaults", "empirical", "experiments",
    "features", "fidelity", "gap", "lipschitz", "load", "memorization", "memory",
    "mixture", "models", "neighbours", "parallel", "process", "prune", "sampling",
    "score", "train", "weights",
]  # fmt: skip


def __getattr__(name):
    # A room is imported when it is first asked for: jax alone takes a second.
    if name == "audit":
        from memsep_jax.experiments.audited import audit

        return audit
    if name == "load":
        from memsep_jax.experiments.loaded import load

        return load
    if name in __all__:
        return importlib.import_module(f"memsep_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*__all__, "__version__"]

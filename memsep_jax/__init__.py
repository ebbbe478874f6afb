"""When does a diffusion model copy its training data, why, and what helps?

The map of the house, from the ground up. Every function is written for one point
x [*event] and one time t []; jax.vmap makes the batch.

Below all (jax only):
  checks        what must be right before anything is traced or compiled
  keys          how a random key branches beside its splits and steps
Mathematics (jax only):
  process       alpha, sigma and what follows from them; laws of t
  mixture       known truths: Gaussian, low-rank, Student-t, boxes; density, score
  empirical     the noised training set: weights, denoiser, score, density, Jacobian
  score         score_fn(x, t), and how a network's answer becomes one
  gap           denoising loss, Fisher divergence, loss gap, its closed forms, detector
  lipschitz     spectral norm of a Jacobian, probes between points, bounds
  sampling      time grids, probability-flow ODE, reverse SDE, EDM's sampler,
                log-likelihood, and the initial noise that comes closest to a point
  fidelity      quality from feature arrays: Frechet distance, precision, recall, KID,
                density, coverage, Vendi score
  neighbours    the nearest distinct training points, exactly
  memorization  what is made of those distances: ratio of copies, null level,
                intervals; other tests of copying; effective memorization; whether two
                models draw the same
Networks (flax.linen):
  models        MLP, DiT and U-Net, for one example; attention that is the exact score;
                inception and alexnet, which only look
Learning:
  data          a data set is an array: load, subset, label, duplicate, draw, stream.
                arrays (what they may hold), readers (folders and zips of images),
                archives (.npz, CIFAR-10, TensorFlow Datasets), sources (one function
                each), subsets (what a run trains on and never sees), batches
  train         step (TrainState, one train step), objectives (what a network learns
                to predict), optimizers
  prune         importance -> keep -> mask -> apply or take away: heads, neurons, blocks
  parallel      one mesh over all devices of all processes: batches are split, a state
                may be; processes that train together
  checkpoint    what is on disk is whole, verified, and the newest
  weights       safetensors: networks of other projects as ours, and ours for them
  features      images as points: Inception, AlexNet and LPIPS, stand-ins, files
Experiments (the only rooms that read a config):
  defaults      every field of a config, with its default; what configs share
  experiments   run(config, workdir). One run: train, optimum; audit (samples of any
                model, which compare measures), calibrate (which metric sees which
                kind of copy). Sweeps, point by point:
                loss_gap, lipschitz, capacity, ensemble (many small networks at once),
                band_swap, mitigate (prune: what helps, and whether it comes back),
                emm (how many training points a network copies), factors (what drives
                it), twins (two networks on disjoint halves), onset (when it begins).
                report draws any of them again, and unfinished what a run that stopped
                early has come to. verdict says what the numbers of a run or an audit
                mean. What they share is setup, session, sweep, networks (trained once
                for all points), stepper, store and monitor (one training), evaluate,
                pruning (one network), record, trackers, figures, dry_run
  command       how a command line becomes a config
  main          the command line
"""

__version__ = "0.1.0"

"""The two extremes that a network lies between: the empirical score and the truth.

Sampling with the empirical score, the minimiser of the training loss, copies the
training set; sampling with the truth, where it is known, gives the null level. Where
the data have labels, the minimiser is the empirical score of the points with the label
(Gu 2023, section 2): with unique labels, the denoiser is that point itself.
"""

from memsep_jax import empirical, mixture, parallel, score
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies.evaluate import evaluate, finish, make_generate


def run(config, session):
    """Samples and evaluates config.optimum.score; nothing is trained."""
    makers = {"empirical": _empirical, "truth": _truth}
    maker = build.look_up(makers, config.optimum.score, "optimum.score")
    with session.phase("data"):
        parts = build.build(config)
        score_of, weights, about = maker(config, parts)
    session.begin(parts.splits.fingerprint, parts.splits)
    mesh = parallel.make_mesh()
    generate = make_generate(config, parts, mesh, score_of, session)
    evaluate(config, parts, session, generate, weights, about)
    finish(session)


def _empirical(config, parts):
    # The data are the weights: an argument of the program, and no constant inside it.
    def score_of(train, label):
        of_label = None if label is None else empirical.labelled(train.label, label)
        scores = [
            empirical.score(train.x, parts.process, log_weights=log_weights)
            for log_weights in (of_label, None)
        ]
        if (weight := config.sampler.guidance) is None:
            return scores[0]
        return score.guided(*scores, weight)

    train = parts.splits.train
    kind = "empirical score" if train.label is None else "empirical score of a label"
    return score_of, train, {"model": {"name": kind, "parameters": train.x.size}}


def _truth(config, parts):
    truth = build.truth(config)

    def score_of(truth, label):
        return mixture.score(truth, parts.process)

    model = {"name": "true score", "parameters": training.count(truth)}
    return score_of, truth, {"model": model}

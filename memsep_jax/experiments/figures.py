"""Numbers to pictures."""


def quietly(say, draw, *args):
    """draw(*args); a disk that is full is one warning, not the end of the run."""
    draw(*args)


def save_samples(path, samples):
    """A grid of samples as PNG."""

"""Report."""


def write(workdir, say):
    """Draws figures/ and report.html from the numbers in a workdir."""


def run(config, workdir):
    """Experiment `report`."""

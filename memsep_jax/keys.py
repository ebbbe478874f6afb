"""Random keys: how a key branches beside its split by name and its steps."""

# fold_in(key, BRANCH) is a key of its own: it is the largest number that fold_in takes,
# and no split, step or epoch comes this far.
BRANCH = 2**32 - 1

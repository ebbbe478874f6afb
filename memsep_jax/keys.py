"""Random keys: the branch of a key that neither its splits nor its steps use."""

# fold_in(key, BRANCH) is a key of its own: it is the largest number that fold_in takes,
# and no split, step or epoch comes this far.
BRANCH = 2**32 - 1

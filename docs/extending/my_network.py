"""A network: 3 x 3 convolutions, without attention."""

import flax.linen as nn

from memsep_jax.models.layers import Embedding


class ConvNet(nn.Module):
    """h <- h + conv(silu(h + W embedding)), depth times."""

    width: int = 32
    depth: int = 3
    num_classes: int = 0  # given by the data: 0 without labels

    @nn.compact
    def __call__(self, x, t, label=None):
        """One example.   x [h, w, c], t [], label [] or None -> [h, w, c]."""
        embedding = Embedding(self.width, self.num_classes)(t, label)
        h = nn.Conv(self.width, (3, 3))(x)
        for _ in range(self.depth):
            shift = nn.Dense(self.width)(nn.silu(embedding))
            h = h + nn.Conv(self.width, (3, 3))(nn.silu(h + shift))
        # Zeros: the training starts from the prediction 0.
        zeros = nn.initializers.zeros
        return nn.Conv(x.shape[-1], (3, 3), kernel_init=zeros)(nn.silu(h))

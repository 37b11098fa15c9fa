"""Images read pixel by pixel, in order or permuted (Le, Jaitly and Hinton 2015; TCN, arXiv 1803.01271)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from xlstm_jax.data import images
from xlstm_jax.tasks.byte_lm import register
from xlstm_jax.tasks.finite import LabelledSequences


@dataclass(frozen=True, eq=False)
class Pixels(LabelledSequences):
    """A pixel a step, 0 to 1, row by row; the class of the image is asked for at the last one.

    28 x 28 -> 784 steps of one number; `pool` 2: means of 2 x 2 pixels, 196 steps.

    `images`: see `data.images`. `permuted`: one order for all images, drawn from `order_seed`. One twelfth of the
    training images (5,000 of 60,000) is the validation split.
    """

    images: str = "fashion_mnist"
    data_dir: str = ""  # of the look-up; "": its default
    permuted: bool = False
    order_seed: int = 0
    pool: int = 1

    name: ClassVar[str] = "pixels"
    num_features: ClassVar[int] = 1

    def _read(self):
        found, digest = images.load(self.images, self.data_dir or None)
        H, W = found["train"][0].shape[1:]
        if self.pool < 1 or H % self.pool or W % self.pool:
            raise ValueError(f"{self.name}: pool must divide the {H} x {W} pixels, not {self.pool}")
        H, W, p = H // self.pool, W // self.pool, self.pool
        order = np.random.default_rng(self.order_seed).permutation(H * W) if self.permuted else np.arange(H * W)
        data = {}
        for split, (pictures, labels) in found.items():
            means = pictures.reshape(-1, H, p, W, p).mean((2, 4), dtype=np.float32).round().astype(np.uint8)
            data[split] = means.reshape(-1, H * W)[:, order], np.full(len(labels), H * W, np.int32), labels
        return data, digest, 256, 1 + max(int(labels.max()) for _, labels in found.values())

    def shown(self, sequences):
        return (sequences.astype(jnp.float32) / 255)[..., None]


register(Pixels)

"""What an encoder-decoder has beside its decoder: an encoder, and how the decoder's layers read it."""

from dataclasses import dataclass

import numpy as np

from msft.models.spec import Block


@dataclass(frozen=True)
class Cross:
    """Hugging Face's names within a decoder's layer of what attends to the encoder, between attention and feed-forward.

    `states` are the modules that read the encoder's hidden states: keys, values.
    """

    norm: str
    query: str
    states: tuple[str, str]
    merge: str

    @property
    def modules(self) -> tuple[str, ...]:
        """The linear modules in the order of their use."""
        return (self.query, *self.states, self.merge)


@dataclass(frozen=True)
class RelativePositions:
    """T5's relative positions (arXiv 1910.10683): each bucket of distances adds a number to a head's scores.

    The table [buckets, heads] of a stack is `module` of its first layer; all its layers share it.
    """

    module: str
    buckets: int
    max_distance: int

    def bucket(self, distance: np.ndarray, is_causal: bool) -> np.ndarray:
        """Return the bucket of each distance from a query to a key (negative: before it), int32 of the same shape.

        Half of the buckets are for single distances, the others for ranges that grow up to `max_distance`. Where
        attention is not causal, half of all are for keys behind the query.
        """
        buckets, first = self.buckets, np.zeros(distance.shape, np.int32)
        if is_causal:
            away = np.maximum(-distance, 0)
        else:
            buckets //= 2
            first, away = (distance > 0).astype(np.int32) * buckets, np.abs(distance)
        exact = buckets // 2
        # In float32 and cut, as transformers has it: whole results are one off elsewhere.
        growth = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
        far = growth / np.float32(np.log(self.max_distance / exact)) * np.float32(buckets - exact)
        far = np.minimum(exact + far.astype(np.int32), buckets - 1)
        return (first + np.where(away < exact, away, far)).astype(np.int32)


@dataclass(frozen=True)
class Encoder:
    """The encoder of an encoder-decoder whose sizes are its decoder's.

    `layers` is what its layers' numbers stand behind, `norm` what stands behind them. Its output and the decoder's
    hidden states meet in `cross`. Decoding begins with the token `start_id`. What the decoder's last norm gives is
    multiplied by `output_scale`.
    """

    num_hidden_layers: int
    block: Block
    cross: Cross
    positions: RelativePositions
    start_id: int
    output_scale: float
    layers: str
    norm: str

    def layer(self, number: int) -> str:
        """Return what the names of a layer's modules begin with, as in 'encoder.block.0.'."""
        return f"{self.layers}.{number}."

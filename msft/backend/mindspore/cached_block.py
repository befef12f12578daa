"""A decoder's block for generation, as a pure function of tensors: keys and values stand in a cache."""

from mindspore import mint
from mindspore import ops as operators

from msft.backend.mindspore import block


def write(decoder, layout):
    """Write one block for generation: it also takes the new positions' slots and the keys and values so far."""
    parts = block.Parts(decoder, layout, 0.0, True)
    project, merge, feed_forward, attention = parts.project(), parts.merge(), parts.feed_forward(), parts.attention

    def cached(hidden, cosine, sine, allowed, slots, keys, values, *tensors):
        query, key, value = project(hidden, cosine, sine, slots, tensors)
        keys = mint.scatter(keys, 2, _spread(slots, key), key)
        values = mint.scatter(values, 2, _spread(slots, value), value)
        hidden = hidden + merge(attention(query, keys, values, allowed), slots, tensors)
        return hidden + feed_forward(hidden, slots, tensors), keys, values

    return cached


def _spread(slots, new):
    """The slot of every element of new keys or values [rows, kv_heads, length, head_dim]."""
    return operators.broadcast_to(slots.reshape(1, 1, -1, 1), new.shape)

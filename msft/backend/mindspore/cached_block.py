"""A decoder's block for generation, as a pure function of tensors but for the cache, which it writes in place."""

from mindspore import ops as operators

from msft.backend.mindspore import block


def write(decoder, layout):
    """Write one block as a function of (hidden, cosine, sine, allowed, places, keys, values, *tensors) -> hidden.

    hidden [rows, length, hidden]; keys, values [rows x kv_heads x capacity, head_dim] are the cache; `places` int32
    [rows x kv_heads x length, 1] says where in it the new ones go. Whole prompts see each other alone, `allowed` being
    [rows, length, length]; single tokens see the cache, `allowed` [rows, 1, capacity].
    """
    parts = block.Parts(decoder, layout, 0.0, True)
    project, merge, feed_forward, attention = parts.project(), parts.merge(), parts.feed_forward(), parts.attention
    dim = decoder.spec.head_dim
    # A second result beside hidden would make the Python thread wait for every block.
    put = operators.ScatterNdUpdate()

    def cached(hidden, cosine, sine, allowed, places, keys, values, *tensors):
        query, key, value = project(hidden, cosine, sine, places, tensors)
        keys = put(keys, places, key.reshape(-1, dim))
        values = put(values, places, value.reshape(-1, dim))
        if hidden.shape[1] == 1:
            shape = (*key.shape[:2], -1, dim)
            mixed = attention(query, keys.reshape(shape), values.reshape(shape), allowed)
        else:
            mixed = operators.depend(attention(query, key, value, allowed), (keys, values))
        hidden = hidden + merge(mixed, places, tensors)
        return hidden + feed_forward(hidden, places, tensors)

    return cached

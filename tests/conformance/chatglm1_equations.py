"""ChatGLM-6B from its equations, for a text at a time: nothing of this is the package's, and nothing else computes it.

GLM, arXiv 2103.10360 (what sees what, two positions), RoFormer 2104.09864 (turned heads, here as complex numbers) and
DeepNet 2203.00555 (residuals), in the way of the release's own modeling file: both norms' outputs are what stays.
"""

import math
from types import SimpleNamespace

import torch


class Equations:
    """The model of a config.json with weights by name; called as transformers' classes are."""

    has_alibi = False

    def __init__(self, config: dict, weights: dict[str, torch.Tensor]):
        self.config = config
        self.weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}

    def __call__(self, input_ids, attention_mask=None, use_cache=False):
        rows, length = input_ids.shape
        logits = []
        for row in range(rows):
            real = length if attention_mask is None else int(attention_mask[row].sum())
            found = self.text(input_ids[row, :real].tolist())
            logits.append(torch.cat((found, found.new_zeros(length - real, found.shape[1]))))
        return SimpleNamespace(logits=torch.stack(logits))

    def named_parameters(self):
        return self.weights.items()

    def zero_grad(self):
        for tensor in self.weights.values():
            tensor.grad = None

    def text(self, ids: list[int]) -> torch.Tensor:
        """The logits of a text without padding."""
        places, blocks, sees = layout(ids, self.config)
        hidden = self.weights["transformer.word_embeddings.weight"][ids]
        for layer in range(self.config["num_layers"]):
            hidden = self.layer(f"transformer.layers.{layer}.", hidden, places, blocks, sees)
        return self.normed("transformer.final_layernorm", hidden) @ self.weights["transformer.word_embeddings.weight"].T

    def layer(self, name, hidden, places, blocks, sees):
        alpha = math.sqrt(2 * self.config["num_layers"])
        normed = self.normed(name + "input_layernorm", hidden)
        hidden = alpha * normed + self.attention(name + "attention.", normed, places, blocks, sees)
        normed = self.normed(name + "post_attention_layernorm", hidden)
        wide = self.linear(name + "mlp.dense_h_to_4h", normed)
        wide = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
        return alpha * normed + self.linear(name + "mlp.dense_4h_to_h", wide)

    def attention(self, name, normed, places, blocks, sees):
        heads = self.config["num_attention_heads"]
        of_heads = self.linear(name + "query_key_value", normed).chunk(heads, -1)
        mixed = []
        for of_head in of_heads:
            query, key, value = of_head.chunk(3, -1)
            query, key = turned(query, places, blocks), turned(key, places, blocks)
            scores = query @ key.T / math.sqrt(query.shape[1])
            mixed.append(scores.masked_fill(~sees, -math.inf).softmax(-1) @ value)
        return self.linear(name + "dense", torch.cat(mixed, -1))

    def linear(self, name, values):
        return values @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def normed(self, name, values):
        centred = values - values.mean(-1, keepdim=True)
        spread = torch.sqrt((centred**2).mean(-1, keepdim=True) + self.config["layernorm_epsilon"])
        return centred / spread * self.weights[name + ".weight"] + self.weights[name + ".bias"]


def layout(ids: list[int], config: dict):
    """Each token's place and block position, and which tokens it sees [tokens, tokens]."""
    count, begin = len(ids), config["bos_token_id"]
    end = ids.index(begin) if begin in ids else count
    masks = [config[name] for name in ("gmask_token_id", "mask_token_id") if config[name] in ids[:end]]
    mask = ids.index(masks[0]) if masks else None
    places = [place if place < end or mask is None else mask for place in range(count)]
    blocks = [0 if place < end else place - end + 1 for place in range(count)]
    sees = [[key < end or key <= query for key in range(count)] for query in range(count)]
    return torch.tensor(places), torch.tensor(blocks), torch.tensor(sees)


def turned(heads, places, blocks):
    """A head's first half turned by places, its second by blocks."""
    half = heads.shape[1] // 2
    frequencies = (10000.0 ** (-torch.arange(0, half, 2) / half)).half().float()
    parts = []
    for part, positions in zip(heads.split(half, -1), (places, blocks), strict=True):
        numbers = torch.complex(part[:, : half // 2], part[:, half // 2 :])
        numbers = numbers * torch.exp(1j * positions[:, None] * frequencies)
        parts += [numbers.real, numbers.imag]
    return torch.cat(parts, -1)

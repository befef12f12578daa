"""The engine-neutral description of a decoder."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msft.models.encoder import Encoder

from msft.models.experts import Experts
from msft.models.state_space import StateSpace


@dataclass(frozen=True)
class Block:
    """What a decoder's layer is made of: Hugging Face's names of its modules within the layer, and how they act.

    The defaults are Llama's. `project` gives queries, keys and values one after another, as three modules or as one;
    where one module `is_grouped`, its outputs stand by key head (the queries that share it, the key, the value).
    `head_norms` norm each head of the queries and of the keys before they are turned. `expand` is a gate and what it
    lets through (two modules, or one that gives both), or where the feed-forward is not `is_gated`, one module.
    `merged_norm` and `contracted_norm` norm what attention and feed-forward give ('' = there is none). Where the two
    are `is_parallel`, both read the block's input. What they give is added to their input, or where there is a
    `residual`, to that times what their norm gives. `biased` are the modules with a bias. Weights of modules that are
    `is_transposed` are [inputs, outputs]. Modules that are `unadapted` take no adapters. '' = there is no such module.
    """

    attention_norm: str = "input_layernorm"
    project: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    is_grouped: bool = False
    head_norms: tuple[str, ...] = ()
    merge: str = "self_attn.o_proj"
    merged_norm: str = ""
    feed_norm: str = "post_attention_layernorm"
    expand: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    contract: str = "mlp.down_proj"
    contracted_norm: str = ""
    activation: str = "silu"
    is_gated: bool = True
    is_parallel: bool = False
    residual: float = 0.0
    is_transposed: bool = False
    biased: tuple[str, ...] = ()
    unadapted: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """The linear modules in the order of their use."""
        return tuple(name for name in (*self.project, self.merge, *self.expand, self.contract) if name)

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms over hidden states, without those over heads."""
        named = (self.attention_norm, self.merged_norm, self.feed_norm, self.contracted_norm)
        return tuple(dict.fromkeys(name for name in named if name))


@dataclass(frozen=True)
class Outside:
    """Hugging Face's names of what stands around a decoder's layers; '' = there is none.

    `layers` is what the layers' numbers stand behind. `positions` is a table of learned positions, whose row
    `first_position` is the first one's.
    """

    embedding: str = "model.embed_tokens"
    positions: str = ""
    first_position: int = 0
    embedding_norm: str = ""
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class Prefix:
    """The tokens by which a model that reads its context in both directions (GLM, arXiv 2103.10360) finds its end.

    All tokens before the first `begin` of a text see each other, `begin` and what follows is causal. Each token has two
    positions, of which the second turns the second half of a head: in the context its place and 0, behind it the place
    of the first of `masks` that the context has, and 1, 2 ...
    """

    begin: int
    masks: tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """Everything an engine needs to build a decoder; sizes are counts, names are Hugging Face's.

    `norm` is 'rms' (RMSNorm, weights of which `norm_offset` is added to) or 'layer' (LayerNorm, with a bias).
    `rope_scaling` is Hugging Face's rope parameters without `rope_theta` (None = plain rotary embedding), of which the
    first `rotary_dim` features of a head are turned (0 = none), in pairs of one of each half, or of `neighbours`.
    `has_alibi` adds ALiBi's slopes (arXiv 2108.12409) to scores. Scores are products times `attention_scale`, squashed
    to +-`attention_cap` where there is one, as logits are to `head_cap`; rows of an `is_head_normed` head are divided
    by their length. `windows` has for each layer how many tokens a query sees, itself included (0 = all before it).
    Embeddings are multiplied by `embedding_scale`. With a `prefix` the second half of a head is turned as the first.
    Where there are `experts`, layers have them in place of the block's feed-forward. Layers with a `state_space` have
    no attention, and 0 heads. An encoder-decoder has an `encoder` too: its layers then read that.
    `hf_config` is the whole `config.json`, kept to be written back beside exported weights.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    rotary_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    hf_config: dict
    attention_scale: float
    windows: tuple[int, ...]
    block: Block = field(default_factory=Block)
    outside: Outside = field(default_factory=Outside)
    norm: str = "rms"
    norm_offset: float = 0.0
    neighbours: bool = False
    has_alibi: bool = False
    attention_cap: float | None = None
    head_cap: float | None = None
    is_head_normed: bool = False
    embedding_scale: float = 1.0
    state_space: StateSpace | None = None
    prefix: Prefix | None = None
    experts: Experts | None = None
    encoder: "Encoder | None" = None

    @property
    def is_like_llama(self) -> bool:
        """Whether the layers and what is around them are Llama's but for sizes, biases, windows and norms of heads.

        Those are what several processes can share out.
        """
        block = replace(self.block, biased=(), head_norms=())
        other = (self.norm_offset, self.neighbours, self.has_alibi, self.attention_cap, self.head_cap)
        is_plain = not any(other) and not self.is_head_normed and self.embedding_scale == 1
        is_plain = is_plain and self.experts is None and self.encoder is None
        is_turned = self.rotary_dim == self.head_dim and not self.prefix
        return is_plain and is_turned and self.norm == "rms" and (block, self.outside) == (Block(), Outside())

    @property
    def embedding(self) -> str:
        """The embedding's tensor."""
        return f"{self.outside.embedding}.weight"

    @property
    def head(self) -> str:
        """The head's tensor; a tied one is the embedding's."""
        return f"{self.outside.head}.weight"

    def has_experts(self, number: int) -> bool:
        """Whether a layer has routed experts in place of the block's feed-forward."""
        return self.experts is not None and number in self.experts.layers

    def layer(self, number: int) -> str:
        """Return what the names of a layer's modules begin with, as in 'model.layers.0.'."""
        return f"{self.outside.layers}.{number}."

"""The Llama as one program, whose operators carry the strategies of MindSpore's semi-automatic mode.

There every tensor is whole in the program and MindSpore cuts it as the strategies say. In one process they have no
effect and the program computes what the blocks of `decoder.py` do: so it is tested. What Ascend makes of it (the cut,
flash attention) was never run here.
"""

from typing import NamedTuple

import mindspore
from mindspore import Parameter, Tensor, nn
from mindspore import ops as operators
from mindspore.ops.operations.nn_ops import FlashAttentionScore

from msft.backend import names, random, slices, strategies
from msft.backend.mindspore import ops
from msft.backend.mindspore.attention import MASKED
from msft.backend.plan import Plan
from msft.models.spec import ModelSpec


class Settings(NamedTuple):
    """What a program is built for; its cells are pure structure over `tensors`, which several programs share.

    `tensors` are parameters by their name in the model ('model.layers.0.self_attn.q_proj.lora_A.weight').
    `dropout` is of adapters, which `adapter` False leaves out. `gives` is what comes out: 'loss' (summed), 'losses'
    [tokens], 'logits' [tokens, vocabulary] or 'states', the hidden states after each part.
    """

    spec: ModelSpec
    plan: Plan
    kernels: ops.Kernels
    compute: str
    rotary: str
    softmax: str
    norm: str
    recompute: bool
    scaling: float
    dropout: float
    adapter: bool
    gives: str
    tensors: dict[str, Parameter]

    def cut(self, primitive, strategy: strategies.Strategy, output: strategies.Strategy | None = None):
        """Return an operator with its strategy; a single device has nothing to cut."""
        if self.plan.devices == 1:
            return primitive
        return primitive.shard(strategy) if output is None else primitive.shard(strategy, output)


class Batch(NamedTuple):
    """What a program takes of a batch: int32 [rows, length], but for `weights` (float32) and the tables [.., size].

    `labels` is 0 where nothing is supervised and `weights` 0 there; `tokens` are dropout's keys. The sine's first
    half is negative.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    tokens: Tensor
    cosine: Tensor
    sine: Tensor


class Whole(nn.Cell):
    """(fields of `Batch`) -> what the settings say."""

    def __init__(self, settings: Settings):
        super().__init__(auto_prefix=False)
        spec, plan = settings.spec, settings.plan
        self.gives, self.hidden = settings.gives, spec.hidden_size
        self.embed = _Embedding(settings)
        self.mask = _Mask(settings)
        layers = range(spec.num_hidden_layers)
        self.blocks = nn.CellList([_Block(settings, f"model.layers.{number}") for number in layers], auto_prefix=False)
        self.finish = _Finish(settings)
        if plan.pipeline > 1:
            self.embed.pipeline_stage, self.finish.pipeline_stage = 0, plan.pipeline - 1
            for number, block in enumerate(self.blocks):
                block.pipeline_stage = plan.stage_of_layer(number, spec.num_hidden_layers)
        if settings.recompute:
            for block in self.blocks:
                block.recompute()

    def construct(self, input_ids, labels, weights, position_ids, segment_ids, tokens, cosine, sine):
        mask = self.mask(position_ids, segment_ids)
        keys, cosine, sine = tokens.reshape(-1, 1), cosine.expand_dims(1), sine.expand_dims(1)
        hidden = self.embed(input_ids)
        states = (hidden,)
        for block in self.blocks:
            hidden = block(hidden, mask, cosine, sine, keys)
            states = states + (hidden,)
        if self.gives == "states":
            return states + (self.finish.norm(hidden),)
        return self.finish(hidden, labels, weights)


class Staged(Whole):
    """The program for several stages, which MindSpore finds where it is one function for all micro-batches."""

    @mindspore.lazy_inline
    def __init__(self, settings: Settings):
        super().__init__(settings)


class _Embedding(nn.Cell):
    def __init__(self, settings: Settings):
        super().__init__(auto_prefix=False)
        self.table = settings.tensors["model.embed_tokens.weight"]
        self.gather = settings.cut(operators.Gather(), strategies.embedding(settings.plan, settings.spec.vocab_size))

    def construct(self, input_ids):
        return self.gather(self.table, input_ids, 0)


class _Mask(nn.Cell):
    """Which keys a query does not see, float32 [rows, 1, length, length]: 1 behind it and in other segments."""

    def __init__(self, settings: Settings):
        super().__init__(auto_prefix=False)
        pair = strategies.attention(settings.plan)["same_segment"]
        both = pair[0], pair[0]
        self.equal = settings.cut(operators.Equal(), pair)
        self.not_before = settings.cut(operators.GreaterEqual(), pair)
        self.both = settings.cut(operators.LogicalAnd(), both)
        self.no = settings.cut(operators.LogicalNot(), both[:1])

    def construct(self, position_ids, segment_ids):
        same = self.equal(segment_ids.expand_dims(2), segment_ids.expand_dims(1))
        # Positions grow within a segment, wherever it stands in its row.
        causal = self.not_before(position_ids.expand_dims(2), position_ids.expand_dims(1))
        return self.no(self.both(same, causal)).astype(mindspore.float32).expand_dims(1)


class _Norm(nn.Cell):
    def __init__(self, settings: Settings, name: str):
        super().__init__(auto_prefix=False)
        parts, cut = strategies.norm(settings.plan), settings.cut
        self.weight, self.eps = settings.tensors[f"{name}.weight"], settings.spec.norm_eps
        self.kind = ops.dtype(settings.norm)
        self.square = cut(operators.Square(), parts["square"])
        self.mean = cut(operators.ReduceMean(keep_dims=True), parts["mean"])
        self.add = cut(operators.Add(), parts["epsilon"])
        self.rsqrt = cut(operators.Rsqrt(), parts["rsqrt"])
        self.scale = cut(operators.Mul(), parts["scale"])
        self.weigh = cut(operators.Mul(), parts["weight"])

    def construct(self, hidden):
        wide = hidden.astype(self.kind)
        scale = self.rsqrt(self.add(self.mean(self.square(wide), -1), self.eps))
        return self.weigh(self.scale(wide, scale).astype(hidden.dtype), self.weight.astype(hidden.dtype))


class _Linear(nn.Cell):
    """(hidden [tokens, inputs], dropout's keys [tokens, 1]) -> [tokens, outputs], with the module's adapter."""

    def __init__(self, settings: Settings, module: str):
        super().__init__(auto_prefix=False)
        tensors, cut = settings.tensors, settings.cut
        by_inputs = slices.module_axis(module) == 1
        parts = (strategies.row if by_inputs else strategies.column)(settings.plan)
        self.compute = ops.dtype(settings.compute)
        self.weight, self.bias = tensors[f"{module}.weight"], tensors.get(f"{module}.bias")
        self.has_bias = self.bias is not None
        self.product = cut(operators.MatMul(transpose_b=True), parts["product"], parts.get("product_output"))
        self.add_bias = cut(operators.Add(), parts["bias"])
        self.has_adapter = settings.adapter and f"{module}.lora_A.weight" in tensors
        if self.has_adapter:
            self.lora_a, self.lora_b = (tensors[f"{module}.lora_{letter}.weight"] for letter in "AB")
            self.reduce = cut(operators.MatMul(transpose_b=True), parts["lora_a"])
            self.expand = cut(operators.MatMul(transpose_b=True), parts["lora_b"])
            self.scaling, self.scale = settings.scaling, cut(operators.Mul(), parts["scaling"])
            self.add = cut(operators.Add(), parts["add"])
            self.dropout = _Dropout(settings, parts, module, self.weight.shape[1])

    def construct(self, hidden, keys):
        result = self.product(hidden, self.weight.astype(self.compute))
        if self.has_bias:
            result = self.add_bias(result, self.bias.astype(self.compute))
        if not self.has_adapter:
            return result
        reduced = self.reduce(self.dropout(hidden, keys), self.lora_a.astype(self.compute))
        return self.add(result, self.scale(self.expand(reduced, self.lora_b.astype(self.compute)), self.scaling))


class _Dropout(nn.Cell):
    """The counter-based dropout of `random.keep_mask`."""

    def __init__(self, settings: Settings, parts, module: str, inputs: int):
        super().__init__(auto_prefix=False)
        cut = settings.cut
        self.probability = settings.dropout
        self.features = Tensor(random.feature_keys(module, inputs))
        numbers = random.MULTIPLIER, random.SHIFT, random.SHIFT_MASK, random.MULTIPLIER_2
        self.multiplier, self.shift, self.shift_mask, self.multiplier_2 = (
            Tensor(number, mindspore.int32) for number in numbers
        )
        self.threshold = Tensor(random.keep_threshold(settings.dropout), mindspore.int32)
        self.key = cut(operators.BitwiseXor(), parts["key"])
        self.mix = cut(operators.BitwiseXor(), parts["bits"])
        self.times = cut(operators.Mul(), parts["number"])
        self.right = cut(operators.RightShift(), parts["number"])
        self.masked = cut(operators.BitwiseAnd(), parts["number"])
        self.at_least = cut(operators.GreaterEqual(), parts["number"])
        self.kept = cut(operators.Mul(), parts["mask"])
        self.enlarge = cut(operators.RealDiv(), parts["number"])

    def construct(self, hidden, keys):
        if self.probability == 0:
            return hidden
        bits = self.times(self.key(keys, self.features), self.multiplier)
        bits = self.mix(bits, self.masked(self.right(bits, self.shift), self.shift_mask))
        keep = self.at_least(self.times(bits, self.multiplier_2), self.threshold)
        return self.kept(self.enlarge(hidden, 1 - self.probability), keep.astype(hidden.dtype))


class _Attention(nn.Cell):
    """(hidden [tokens, hidden], mask, tables [rows, 1, length, size], dropout's keys) -> [tokens, hidden]."""

    def __init__(self, settings: Settings, module: str):
        super().__init__(auto_prefix=False)
        spec, parts, cut = settings.spec, strategies.attention(settings.plan), settings.cut
        self.heads, self.kv_heads, self.size = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.compute, self.kind, self.rotary = map(ops.dtype, (settings.compute, settings.softmax, settings.rotary))
        self.query, self.key, self.value = (_Linear(settings, f"{module}.{letter}_proj") for letter in "qkv")
        self.output = _Linear(settings, f"{module}.o_proj")
        self.split_heads = cut(operators.Transpose(), parts["split_heads"])
        self.merge_heads = cut(operators.Transpose(), parts["merge_heads"])
        self.halves = cut(operators.Split(3, 2), parts["half"])
        self.join = cut(operators.Concat(3), parts["join_halves"])
        self.turn, self.add = cut(operators.Mul(), parts["turn"]), cut(operators.Add(), parts["add"])
        self.is_fused = settings.kernels.is_attention_fused
        self.scale = spec.head_dim**-0.5
        # What is not seen; finite in float16 too, because it is multiplied by 0 where it is.
        self.unseen = -6e4 if settings.softmax == "float16" else MASKED
        if self.is_fused:
            kernel = FlashAttentionScore(head_num=self.heads, scale_value=self.scale, input_layout="BNSD")
            self.fused = cut(kernel, parts["fused"])
        self.repeat = cut(operators.Tile(), parts["repeat"])
        self.shrink = cut(operators.Mul(), parts["number"])
        self.scores = cut(operators.BatchMatMul(transpose_b=True), parts["scores"])
        self.add_mask = cut(operators.Add(), parts["mask"])
        self.hide = cut(operators.Mul(), (parts["mask"][0], ()))
        self.softmax = cut(operators.Softmax(), parts["softmax"])
        self.mix = cut(operators.BatchMatMul(), parts["mix"])

    def construct(self, hidden, mask, cosine, sine, keys):
        rows, length = cosine.shape[0], cosine.shape[2]
        query = self.turned(self.by_head(self.query(hidden, keys), rows, length, self.heads), cosine, sine)
        key = self.turned(self.by_head(self.key(hidden, keys), rows, length, self.kv_heads), cosine, sine)
        value = self.by_head(self.value(hidden, keys), rows, length, self.kv_heads)
        if self.is_fused:
            mixed = self.fused(query, key, value, None, None, None, mask.astype(mindspore.uint8))[3]
        else:
            mixed = self.plain(query, self.for_all(key), self.for_all(value), mask)
        merged = self.merge_heads(mixed, (0, 2, 1, 3)).reshape(rows * length, self.heads * self.size)
        return self.output(merged, keys)

    def by_head(self, values, rows, length, heads):
        """[tokens, heads x size] -> [rows, heads, length, size]."""
        return self.split_heads(values.reshape(rows, length, heads, self.size), (0, 2, 1, 3))

    def turned(self, heads, cosine, sine):
        """The rotary embedding."""
        wide = heads.astype(self.rotary)
        first, second = self.halves(wide)
        swapped = self.join((second, first))
        cosine, sine = cosine.astype(self.rotary), sine.astype(self.rotary)
        return self.add(self.turn(wide, cosine), self.turn(swapped, sine)).astype(heads.dtype)

    def for_all(self, heads):
        """Heads of keys or values once for each head of queries that shares them."""
        rows, count, length, size = heads.shape
        if count == self.heads:
            return heads
        repeated = self.repeat(heads.reshape(rows, count, 1, length * size), (1, 1, self.heads // count, 1))
        return repeated.reshape(rows, self.heads, length, size)

    def plain(self, query, key, value, mask):
        """Softmax over what is seen."""
        scores = self.scores(self.shrink(query, self.scale), key).astype(self.kind)
        weights = self.softmax(self.add_mask(self.hide(mask.astype(self.kind), self.unseen), scores))
        return self.mix(weights.astype(self.compute), value)


class _FeedForward(nn.Cell):
    def __init__(self, settings: Settings, module: str):
        super().__init__(auto_prefix=False)
        parts, cut = strategies.feed_forward(settings.plan), settings.cut
        self.gate, self.up, self.down = (_Linear(settings, f"{module}.{word}_proj") for word in ("gate", "up", "down"))
        self.sigmoid = cut(operators.Sigmoid(), parts["activation"])
        self.multiply = cut(operators.Mul(), parts["multiply"])

    def construct(self, hidden, keys):
        gate = self.gate(hidden, keys)
        silu = self.multiply(gate, self.sigmoid(gate))
        return self.down(self.multiply(silu, self.up(hidden, keys)), keys)


class _Block(nn.Cell):
    def __init__(self, settings: Settings, layer: str):
        super().__init__(auto_prefix=False)
        self.compute = ops.dtype(settings.compute)
        self.before_attention = _Norm(settings, f"{layer}.input_layernorm")
        self.attention = _Attention(settings, f"{layer}.self_attn")
        self.before_feed_forward = _Norm(settings, f"{layer}.post_attention_layernorm")
        self.feed_forward = _FeedForward(settings, f"{layer}.mlp")
        self.add = settings.cut(operators.Add(), strategies.residual(settings.plan))

    def construct(self, hidden, mask, cosine, sine, keys):
        attended = self.attention(self.flat(self.before_attention(hidden)), mask, cosine, sine, keys)
        hidden = self.add(hidden, attended.reshape(hidden.shape).astype(hidden.dtype))
        found = self.feed_forward(self.flat(self.before_feed_forward(hidden)), keys)
        return self.add(hidden, found.reshape(hidden.shape).astype(hidden.dtype))

    def flat(self, hidden):
        """[rows, length, hidden] -> [tokens, hidden] in the compute dtype."""
        return hidden.reshape(-1, hidden.shape[2]).astype(self.compute)


class _Finish(nn.Cell):
    """The last norm, the head and the loss."""

    def __init__(self, settings: Settings):
        super().__init__(auto_prefix=False)
        spec, plan, cut = settings.spec, settings.plan, settings.cut
        tied = "model.embed_tokens.weight" if spec.tie_word_embeddings else names.HEAD
        self.weight, self.compute = settings.tensors[tied], ops.dtype(settings.compute)
        self.gives, self.vocabulary = settings.gives, spec.vocab_size
        self.norm = _Norm(settings, "model.norm")
        self.head = cut(operators.MatMul(transpose_b=True), strategies.head(plan, spec.vocab_size))
        parts = strategies.loss(plan, spec.vocab_size)
        self.largest = cut(operators.ReduceMax(keep_dims=True), parts["reduce"])
        self.total = cut(operators.ReduceSum(), parts["reduce"])
        self.subtract = cut(operators.Sub(), parts["subtract"])
        self.exponential = cut(operators.Exp(), parts["one_by_one"])
        self.one_hot = cut(operators.OneHot(), parts["one_hot"])
        self.choose = cut(operators.Mul(), parts["multiply"])
        self.log = cut(operators.Log(), parts["log"])
        self.difference = cut(operators.Sub(), parts["of_tokens"])
        self.weigh = cut(operators.Mul(), parts["of_tokens"])
        self.sum = cut(operators.ReduceSum(), parts["sum"])
        self.on, self.off = Tensor(1.0, mindspore.float32), Tensor(0.0, mindspore.float32)

    def construct(self, hidden, labels, weights):
        normed = self.norm(hidden).reshape(-1, hidden.shape[2]).astype(self.compute)
        logits = self.head(normed, self.weight.astype(self.compute)).astype(mindspore.float32)
        if self.gives == "logits":
            return logits
        losses = self.losses(logits, labels.reshape(-1))
        return losses if self.gives == "losses" else self.sum(self.weigh(losses, weights.reshape(-1)), 0)

    def losses(self, logits, labels):
        """The cross-entropy of each position [tokens]."""
        shifted = self.subtract(logits, operators.stop_gradient(self.largest(logits, 1)))
        chosen = self.choose(shifted, self.one_hot(labels, self.vocabulary, self.on, self.off))
        return self.difference(self.log(self.total(self.exponential(shifted), 1)), self.total(chosen, 1))

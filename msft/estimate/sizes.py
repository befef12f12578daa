"""What a model, its tuning and its micro-batches come to in numbers, counted once for many layouts."""

from math import prod
from typing import NamedTuple

from msft.backend.contract import Precision, Tuning
from msft.config import derive
from msft.config.schema import Recipe
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Share(NamedTuple):
    """Numbers of parameters: all of them, and those that are tuned."""

    all: int
    tuned: int


class Sizes(NamedTuple):
    """A model that is tuned; parameters are counted over all blocks, `spec` has the widths.

    `linears` are the blocks' matrices, `others` their norms, biases and convolutions; `head` counts 0 where it is the
    embedding. `adapters` are split by tensor parallelism as `split_adapters` says, the rest of them is not. The shares
    of blocks that keep the inputs of their linear modules for gradients: `keeps_normed` (of q, k, v), `keeps_mixed`
    (o), `keeps_wide_normed` (gate, up), `keeps_gated` (down). `dropped` are features under dropout masks and `ranks`
    the adapters' middle values, over all blocks, a token. `wide` are the features of a token in a feed-forward, of its
    experts too, mean over blocks; `routed` is the share of blocks with experts, `idle` the parameters of experts that a
    token does not have, `largest` the numbers of a block's largest tensor.
    """

    spec: ModelSpec
    linears: Share
    others: Share
    embedding: Share
    head: Share
    last_norm: Share
    adapters: int
    split_adapters: int
    keeps_normed: float
    keeps_mixed: float
    keeps_wide_normed: float
    keeps_gated: float
    dropped: int
    ranks: int
    wide: float
    routed: float
    idle: Share
    largest: int

    @property
    def parameters(self) -> int:
        """All parameters, adapters included."""
        parts = (self.linears, self.others, self.embedding, self.head, self.last_norm)
        return sum(part.all for part in parts) + self.adapters

    @property
    def tuned(self) -> int:
        """Parameters that are trained."""
        parts = (self.linears, self.others, self.embedding, self.head, self.last_norm)
        return sum(part.tuned for part in parts) + self.adapters

    @property
    def head_tuned(self) -> bool:
        """Whether the head has a gradient, be it the embedding's."""
        return bool(self.embedding.tuned if self.spec.tie_word_embeddings else self.head.tuned)


class Work(NamedTuple):
    """What runs: the engine, its dtypes, a micro-batch of `rows` x `length` tokens, all real and supervised.

    `parts` devices share the tokens of these rows (`Layout.context`).
    """

    backend: str
    kind: str
    precision: Precision
    rows: int
    length: int
    recompute: bool
    parts: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that a device computes."""
        return -(-self.rows * self.length // self.parts)


def sizes_of(spec: ModelSpec, tuning: Tuning) -> Sizes:
    """Count a model's parameters and what its blocks keep for the tuned ones."""
    shapes = tensor_shapes(spec)
    tuned = set(tuning.parameters)

    def share(names) -> Share:
        counts = {name: prod(shapes[name]) for name in names}
        return Share(sum(counts.values()), sum(count for name, count in counts.items() if name in tuned))

    block, around = spec.block, spec.outside
    stacks = (around.layers, spec.encoder.layers) if spec.encoder else (around.layers,)
    in_blocks = [name for name in shapes if name.startswith(tuple(f"{stack}." for stack in stacks))]
    stacked = [name for name in in_blocks if len(shapes[name]) == 3] if spec.experts else []
    linears = [name for name in in_blocks if len(shapes[name]) == 2] + stacked
    modules = tuning.lora.modules if tuning.lora else ()
    rank, dropout = (tuning.lora.rank, tuning.lora.dropout) if tuning.lora else (0, 0.0)
    turn = -1 if block.is_transposed else 1
    widths = {module: shapes[f"{module}.weight"][::turn] for module in modules}
    learning = {name.removesuffix(".weight") for name in linears if name in tuned} | set(modules)

    experts = spec.experts
    routed = len(experts.layers) / spec.num_hidden_layers if experts else 0.0
    in_experts = experts.chosen * experts.width + experts.shared_width if experts else 0
    idle = 1 - experts.chosen / experts.count if experts else 0.0
    of_all = share(stacked)
    learning |= set(stacked) & tuned

    def keeps(*names: str) -> float:
        numbers = range(spec.num_hidden_layers)
        return sum(any(spec.layer(number) + name in learning for name in names) for number in numbers) / len(numbers)

    # Adapters of these modules stand behind what tensor parallelism has split: their A is split, of the others their B.
    split_input = (block.merge, block.contract)
    split = sum(width[1] if module.endswith(split_input) else width[0] for module, width in widths.items())
    norms = tuple(f"{norm}." for norm in ((around.norm, spec.encoder.norm) if spec.encoder else (around.norm,)))
    last = (*norms, f"{around.head}.")
    return Sizes(
        spec=spec,
        linears=share(linears),
        others=share(name for name in in_blocks if name not in linears),
        embedding=share(name for name in shapes if name not in in_blocks and not name.startswith(last)),
        head=share([spec.head] if spec.head in shapes else []),
        last_norm=share(name for name in shapes if name.startswith(norms)),
        adapters=rank * sum(map(sum, widths.values())),
        split_adapters=rank * split,
        keeps_normed=keeps(*block.project),
        keeps_mixed=keeps(block.merge),
        keeps_wide_normed=keeps(*block.expand, *((experts.expand, *experts.shared_expand) if experts else ())),
        keeps_gated=keeps(block.contract, *((experts.contract, experts.shared_contract) if experts else ())),
        dropped=round(passed(spec) * sum(width[1] for width in widths.values())) if dropout else 0,
        ranks=round(passed(spec) * rank * len(modules)),
        wide=(1 - routed) * spec.intermediate_size + routed * in_experts,
        routed=routed,
        idle=Share(round(idle * of_all.all), round(idle * of_all.tuned)),
        largest=max(prod(shapes[name]) for name in stacked) if stacked else spec.hidden_size * spec.intermediate_size,
    )


def passed(spec: ModelSpec) -> float:
    """Return the share of all blocks that a token passes: half of an encoder-decoder's, the encoder's or decoder's."""
    return 0.5 if spec.encoder else 1.0


def work_of(recipe: Recipe, kind: str) -> Work:
    """Return what a recipe runs on a kind of device (cpu, cuda, npu)."""
    return Work(
        backend=recipe.backend,
        kind=kind,
        precision=derive.precision(recipe, kind),
        rows=derive.micro_batch_size(recipe),
        length=derive.seq_length(recipe),
        recompute=derive.recompute(recipe),
    )

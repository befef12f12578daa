"""How many devices MindSpore's semi-automatic mode cuts a model and its batches over."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """`data` x `context` x `tensor` devices in each of `pipeline` stages, in MindFormers' words of `parallel_config`.

    `data` parts of the rows, `context` parts of their tokens, `tensor` parts of matrices and heads. `vocab_emb_dp`
    leaves embedding and head whole; `use_seq_parallel` cuts the tokens of norms and sums over `tensor` too.
    `micro_batches` are the parts of a step's rows that follow one another through the stages.
    """

    data: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    micro_batches: int = 1
    vocab_emb_dp: bool = True
    use_seq_parallel: bool = False
    shard_optimizer: bool = False

    @property
    def stage_devices(self) -> int:
        """Devices of one stage."""
        return self.data * self.context * self.tensor

    @property
    def devices(self) -> int:
        """Devices of all stages."""
        return self.stage_devices * self.pipeline

    def stage_of_layer(self, layer: int, layers: int) -> int:
        """Return the stage, from 0, of a block among `layers`: equally many follow one another on each."""
        return layer * self.pipeline // layers

    def cuts_vocabulary(self, vocab_size: int) -> bool:
        """Whether embedding and head are cut; MindFormers leaves whole what does not divide."""
        return not self.vocab_emb_dp and vocab_size % (self.tensor * self.context) == 0

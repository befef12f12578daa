"""The dataset blocks."""

from typing import Annotated, Any, Literal

from pydantic import Field

from msft.config.block import Block
from msft.config.markers import Alias, Count, NotNegative, Positive, Refused, Switch, Texts, Unused

Workers = Annotated[Any, Unused("batches are built in numpy, in this process")]


def _refused(why: str, *neutral: Any) -> Any:
    return Annotated[Any, Refused(why, neutral)]


class RawFile(Block):
    """A JSON file of rows, or a folder of such files.

    Rows are of any format that `llama_preprocess` knows, unless `formatting` says which, as LLaMA-Factory's
    dataset_info.json does with its keys `columns` and `tags`; `num_samples` takes the first rows alone.
    """

    path: Annotated[str, Field(min_length=1)]
    formatting: Literal["alpaca", "sharegpt"] | None = None
    columns: dict[str, str | None] | None = None
    tags: dict[str, str | None] | None = None
    num_samples: Positive | None = None


class RawData(Block):
    """Rows of JSON that are made into MindRecord, below output_dir, when a run starts (as `llama_preprocess` does).

    `template` is a name that `llama_preprocess` takes; '' is the tokenizer's own, else the model family's. A row is
    `max_length` tokens long (unset: the model's seq_length + 1). `last_answer_only` supervises the last answer of a
    conversation alone. With `running_text` rows hold texts for pretraining, which are joined and cut, with the
    tokenizer's begin tokens and the end token around each text as `begin` and `end` say.
    """

    files: Annotated[list[RawFile], Field(min_length=1)]
    template: str = ""
    max_length: Annotated[Positive, Field(ge=2)] | None = None
    last_answer_only: Switch = False
    running_text: Switch = False
    begin: Switch = True
    end: Switch = True
    num_workers: Positive | None = None


class DataLoader(Block):
    """A MindRecord file, a folder of them, or in `dataset_files` a list; or rows that are made into one, in `raw`."""

    type: Literal["MindDataset"] = "MindDataset"
    dataset_dir: str = ""
    dataset_files: Texts = []
    raw: RawData | None = None
    shuffle: Switch = True
    num_samples: Count | None = None
    num_parallel_workers: Workers = None
    columns_list: Annotated[Any, Unused("columns are chosen by input_columns")] = None
    num_shards: Annotated[Any, Unused("the launcher decides how many processes there are")] = None
    shard_id: Annotated[Any, Unused("the launcher decides how many processes there are")] = None


class EvalLoader(DataLoader):
    """The same for evaluation: rows in the file's order.

    `held_out` takes that share (below 1), or number, of the rows of train_dataset out of training and evaluates on
    them; which ones follows from the seed as in the datasets library's train_test_split.
    """

    shuffle: Switch = False
    held_out: NotNegative = 0.0


class Dataset(Block):
    """What is trained on. Without `labels` among `input_columns` every token but padding is supervised.

    With `packing` whole examples share a row as long as the longest one's place, and `batch_size` counts such rows;
    `length_grouping` puts examples of similar length into a step. `padding` None: see `derive.padding`.
    """

    data_loader: DataLoader = DataLoader()
    input_columns: Texts = ["input_ids", "labels"]
    batch_size: Positive | None = None
    drop_remainder: Switch = True
    repeat: Positive = 1
    padding: Literal["longest", "bucket", "max_length"] | None = None
    bucket_size: Positive = 64
    packing: Switch = False
    length_grouping: Switch = False
    num_parallel_workers: Workers = None
    python_multiprocessing: Workers = None
    numa_enable: Workers = None
    prefetch_size: Workers = None
    max_rowsize: Workers = None
    cache: Workers = None
    offload: Workers = None
    auto_tune: Workers = None
    filepath_prefix: Workers = None
    autotune_per_step: Workers = None
    profile: Workers = None
    do_eval: Annotated[Any, Unused("evaluation is asked for by the recipe's do_eval")] = None
    seed: Annotated[Any, Unused("the order of rows follows the recipe's seed")] = None
    output_columns: Annotated[Any, Unused("columns are chosen by input_columns")] = None
    column_order: Annotated[Any, Unused("columns are chosen by input_columns")] = None
    pad_token_id: Annotated[Any, Unused("the pad token is the model's")] = None
    dynamic_batch: Annotated[Any, Unused("lengths are chosen by padding and bucket_size")] = None
    divisor: Annotated[Any, Unused("lengths are chosen by padding and bucket_size")] = None
    remainder: Annotated[Any, Unused("lengths are chosen by padding and bucket_size")] = None
    eod_reset: _refused("attention that restarts at an end-of-document token is not built", False) = None
    eod_token_id: Annotated[Any, Unused("it belongs to eod_reset")] = None
    per_batch_map: _refused("python functions in a recipe are not run", "") = None


class EvalDataset(Dataset):
    """What is evaluated on: every row counts."""

    data_loader: EvalLoader = EvalLoader()
    drop_remainder: Switch = False
    length_grouping: _refused("evaluation takes the rows in the file's order; packing serves it too", False) = None


class TrainTask(Block):
    """MindFormers' second name of the dataset; only the block `train_dataset` is read."""

    type: Literal["CausalLanguageModelDataset"] = "CausalLanguageModelDataset"
    dataset_config: Annotated[Any, Alias("train_dataset")] = Field(default=None, exclude=True)


class EvalTask(Block):
    """MindFormers' second name of the dataset; only the block `eval_dataset` is read."""

    type: Literal["CausalLanguageModelDataset"] = "CausalLanguageModelDataset"
    dataset_config: Annotated[Any, Alias("eval_dataset")] = Field(default=None, exclude=True)

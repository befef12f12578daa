"""What a run writes besides its log: checkpoints on the way, adapter or model at the end."""

import contextlib
from dataclasses import asdict
from pathlib import Path

from msft.backend.contract import EngineState
from msft.config.derive import Saving
from msft.config.schema import Recipe
from msft.convert import companions
from msft.errors import RunError
from msft.files import write_json, write_text
from msft.train import checkpoint, outputs
from msft.train.checkpoint import TrainerState
from msft.train.loop import Progress
from msft.train.prepare import Prepared
from msft.train.setup import Session
from msft.train.weights import write_lora, write_model


class Saver:
    """Writes a run's checkpoints and results; only the first rank writes."""

    def __init__(self, prepared: Prepared, session: Session, settings: Saving | None, versions: dict, facts: dict):
        """`facts` are the fields of TrainerState that stay the same in a run."""
        self.prepared, self.session, self.settings = prepared, session, settings
        self.versions, self.facts = versions, facts

    def start(self) -> None:
        """Write the resolved recipe and the versions."""
        if self.session.rank == 0:
            self._write_facts(self.prepared.output_dir)

    def checkpoint(self, progress: Progress, epoch: float) -> None:
        """Write the checkpoint of a step, then remove the oldest ones beyond `keep_checkpoint_max`."""
        path = checkpoint.folder(self.prepared.output_dir, progress.step)
        if self.session.rank != 0 or path.exists():
            return
        state = self.session.engine.export_state()
        trainer_state = TrainerState(
            **self.facts,
            **asdict(progress),
            epoch=epoch,
            counters=state.counters,
            tuned=tuple(state.weights),
        )
        with _named(path):
            checkpoint.write(path, trainer_state, state, lambda folder, state: self._write_files(folder, path, state))
            checkpoint.prune(path.parent, self.settings.keep, progress.step)

    def results(self) -> tuple[Path | None, Path | None]:
        """Write the end results; returns the folders of the adapter and of the model, None where there is none.

        The model is written when base weights were trained, or when nobody else has them.
        """
        output_dir, tuning, base = self.prepared.output_dir, self.prepared.tuning, self.prepared.weights.path
        adapter = output_dir / outputs.ADAPTER if tuning.lora else None
        model = output_dir / outputs.MODEL if tuning.parameters or base is None else None
        if self.session.rank == 0:
            state = self.session.engine.export_state()
            with _named(output_dir):
                if model:
                    self._write_model(model, state, bar=True)
                if adapter:
                    write_lora(adapter, self.prepared.spec, tuning, state, str((model or base).resolve()))
        return adapter, model

    def _write_files(self, folder: Path, path: Path, state: EngineState) -> None:
        """Fill a checkpoint's `folder`, which will be called `path`."""
        tuning, base = self.prepared.tuning, self.prepared.weights.path
        if tuning.parameters:
            self._write_model(folder, state, bar=False)
            base = path
        else:
            folder.mkdir()
        if tuning.lora:
            base = base or self.prepared.output_dir / outputs.MODEL
            write_lora(folder, self.prepared.spec, tuning, state, str(base.resolve()))
        self._write_facts(folder)

    def _write_model(self, folder: Path, state: EngineState, bar: bool) -> None:
        files = _tokenizer_files(self.prepared.recipe, self.prepared.weights.path)
        write_model(folder, self.prepared.spec, self.prepared.weights.base, state, files, bar)

    def _write_facts(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / outputs.RECIPE, self.prepared.recipe.to_yaml())
        write_json(folder / outputs.VERSIONS, self.versions)


def _tokenizer_files(recipe: Recipe, weights: Path | None) -> dict[str, bytes | Path]:
    """The tokenizer's files to lie beside a written model: the recipe's tokenizer, else the pretrained folder's."""
    vocabulary = recipe.processor.tokenizer.vocab_file
    if vocabulary.endswith(".model"):
        return {"tokenizer.model": Path(vocabulary)}
    for place in filter(None, (vocabulary, recipe.model.pretrained)):
        folder = Path(place) if Path(place).is_dir() else Path(place).parent
        found = {name: folder / name for name in companions.NAMES if (folder / name).is_file()}
        if found:
            return found
    return companions.find(None, weights) if weights else {}


@contextlib.contextmanager
def _named(path: Path):
    """Turn the system's refusals to write into one message."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error

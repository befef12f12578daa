"""What a run writes besides its log: checkpoints on the way, adapter or model at the end."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from msft.backend.contract import EngineState, StateParts
from msft.config import derive
from msft.config.schema import Recipe
from msft.convert import companions
from msft.data.batches import BatchStream
from msft.data.tokenizer_files import ICE_TEXT
from msft.errors import RunError
from msft.files import new_token, temporary_path, write_json, write_text
from msft.train import checkpoint, ckpt_export, gathering, outputs, sliced
from msft.train.checkpoint import TrainerState
from msft.train.loop import Progress
from msft.train.prepare import Prepared
from msft.train.setup import Session
from msft.train.weights import write_lora, write_model
from msft.train.writer import Writer


class Saver:
    """Writes a run's checkpoints and results; only the first rank writes.

    Between two steps the state is copied (float32: the tuned weights and both moments), then written by a thread
    while steps go on, unless `async_save` is False. The next save, and the end of the `with` block, wait for it.
    """

    def __init__(self, prepared: Prepared, session: Session, stream: BatchStream, versions: dict, facts: dict):
        """`facts` are the fields of TrainerState that stay the same in a run."""
        self.prepared, self.session, self.stream = prepared, session, stream
        self.versions, self.facts = versions, facts
        self.settings = derive.saving(prepared.recipe) or derive.saving_when_stopped()
        self.writer = Writer(self.settings.background)

    def __enter__(self) -> "Saver":
        self.writer.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.writer.__exit__(*error)

    def start(self, step: int) -> None:
        """Write the resolved recipe and the versions; remove what a run that was killed at `step` had not yet."""
        if self.session.rank == 0:
            with outputs.writable(self.prepared.output_dir):
                self._write_facts(self.prepared.output_dir)
                if self.session.deepspeed:
                    write_json(self.prepared.output_dir / outputs.DEEPSPEED, self.session.deepspeed)
                self._prune(step)

    def checkpoint(self, progress: Progress) -> None:
        """Begin to write the checkpoint of a step; then the oldest ones beyond `keep_checkpoint_max` are removed.

        Raises RunError when the checkpoint before could not be written.
        """
        path = checkpoint.folder(self.prepared.output_dir, progress.step)
        if self._is_sliced and not self.settings.ckpt:
            self._checkpoint_parts(path, progress)
            return
        if not self._takes_part:
            return
        # Before the state is copied: two copies would take twice the memory.
        self.writer.wait()
        # Every rank that holds a part of the state gives it.
        state = self.session.engine.export_state()
        if self.session.rank != 0 or path.exists():
            return
        self._check_folder(path)
        trainer_state = self._trainer_state(progress, state.counters, tuple(state.weights))
        self.writer.start(lambda: self._write(path, trainer_state, state))

    def _checkpoint_parts(self, path: Path, progress: Progress) -> None:
        """Begin to write this rank's part of a checkpoint; the first rank makes the parts one."""
        self.writer.wait()
        session, token = self.session, new_token()
        known = [float(int(token, 16)), float(path.exists())] if session.rank == 0 else [0.0, 0.0]
        agreed, exists = session.distributed.sum_numbers(known)
        if exists:
            return
        token, parts = f"{int(agreed):08x}", session.engine.export_parts()
        adapter = session.engine.export_adapter() if self.prepared.tuning.lora else {}
        if session.rank:
            self.writer.start(lambda: self._write_part(path, token, parts))
            return
        self._check_folder(path)
        state = EngineState(adapter, {}, {}, parts.counters)
        trainer_state = self._trainer_state(progress, parts.counters, tuple(session.engine.tuned_names()))
        self.writer.start(lambda: self._write_parts(path, token, trainer_state, parts, state))

    def _check_folder(self, path: Path) -> None:
        if not self.prepared.output_dir.is_dir():
            raise RunError(f"{path}: cannot be written: {self.prepared.output_dir} is no longer there")

    def _write_part(self, path: Path, token: str, parts: StateParts) -> None:
        checkpoint.check_finite(path, parts)
        with outputs.writable(path):
            sliced.write(temporary_path(path, token), self.session.rank, parts)

    def _write_parts(self, path: Path, token: str, trainer_state: TrainerState, parts: StateParts, state: EngineState):
        checkpoint.check_finite(path, parts)

        def write_files(folder: Path) -> None:
            if self.prepared.tuning.lora:
                base = None if self.prepared.tuning.parameters else self.prepared.weights.path
                base = base or self.prepared.output_dir / outputs.MODEL
                write_lora(folder, self.prepared.spec, self.prepared.tuning, state, str(base.resolve()))
            self._write_facts(folder)

        with outputs.writable(path):
            checkpoint.write_parts(path, token, trainer_state, parts, self.session.world, write_files)
            self._prune(trainer_state.step)

    @property
    def _is_sliced(self) -> bool:
        """Whether no rank has the whole state."""
        engine = self.session.engine
        return self.session.mesh.parts > 1 or engine.shares_state or engine.is_sharded

    @property
    def _takes_part(self) -> bool:
        """Whether this rank has a part of the state that the first one writes."""
        engine = self.session.engine
        return self.session.mesh.replica_rank == 0 or engine.shares_state or engine.is_sharded

    def _write(self, path: Path, trainer_state: TrainerState, state: EngineState) -> None:
        checkpoint.check_finite(path, state)
        try:
            # First: a run that is killed in between goes on from the checkpoint before, and writes both again.
            if self.settings.ckpt:
                with outputs.writable(self.prepared.output_dir / ckpt_export.FOLDER):
                    self._write_ckpt(trainer_state.step, state)
        finally:
            # Also when there was no room for the CKPT, which has whole models in it.
            with outputs.writable(path):
                checkpoint.write(path, trainer_state, state, lambda place, found: self._write_files(place, path, found))
                self._prune(trainer_state.step)

    def _write_ckpt(self, step: int, state: EngineState) -> None:
        base, spec = self.prepared.weights.base, self.prepared.spec
        ckpt_export.write(self.prepared.output_dir, self.settings.prefix, self._epoch_and_step(step), spec, base, state)

    def _prune(self, step: int) -> None:
        """Remove the oldest checkpoints, and their CKPTs, beyond `keep_checkpoint_max` of those up to `step`."""
        if step:
            output_dir, keep = self.prepared.output_dir, self.settings.keep
            checkpoint.prune(output_dir / checkpoint.FOLDER, keep, step)
            ckpt_export.prune(output_dir, self.settings.prefix, keep, self._epoch_and_step(step))

    def _epoch_and_step(self, step: int) -> tuple[int, int]:
        """The epoch, and the step within it, that end with `step`; both from 1."""
        epoch, step_in_epoch = self.stream.position(step - 1)
        return epoch + 1, step_in_epoch + 1

    def _trainer_state(self, progress: Progress, counters: dict, tuned: tuple[str, ...]) -> TrainerState:
        epoch, step_in_epoch = self.stream.position(progress.step)
        return TrainerState(
            **self.facts,
            **asdict(progress),
            epoch=progress.step / self.stream.steps_per_epoch,
            position={
                "epoch": epoch,
                "step_in_epoch": step_in_epoch,
                "rows_taken": progress.step * self.facts["rows_per_step"],
            },
            random={"seed": self.facts["seed"], "dropout_step": int(counters["step"]), "epoch": epoch},
            counters=counters,
            tuned=tuned,
        )

    def results(self) -> tuple[Path | None, Path | None]:
        """Write the end results; returns the folders of the adapter and of the model, None where there is none.

        The model is written when base weights were trained, or when nobody else has them.
        """
        output_dir, tuning, base = self.prepared.output_dir, self.prepared.tuning, self.prepared.weights.path
        adapter = output_dir / outputs.ADAPTER if tuning.lora else None
        model = output_dir / outputs.MODEL if tuning.parameters or base is None else None
        if self.session.mesh.replica_rank and not self._is_gathered:
            return adapter, model
        with self._tuned_weights() as weights:
            # Without moments, which need not fit into one process's memory where they are dealt out.
            state = EngineState(weights, {}, {}, {})
            if self.session.rank == 0:
                checkpoint.check_finite(output_dir, state)
                with outputs.writable(output_dir):
                    if model:
                        self._write_model(model, state, bar=True)
                    if adapter:
                        write_lora(adapter, self.prepared.spec, tuning, state, str((model or base).resolve()))
        return adapter, model

    @property
    def _is_gathered(self) -> bool:
        """Whether no rank has whole weights."""
        return self.session.mesh.parts > 1 or self.session.engine.is_sharded

    def _tuned_weights(self):
        """A context with the tuned tensors, whole on the first rank."""
        if self._is_gathered:
            return gathering.whole_tensors(self.session)
        return nullcontext(self.session.engine.export_weights())

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
        path = Path(vocabulary)
        return {path.name if path.name == ICE_TEXT else "tokenizer.model": path}
    for place in filter(None, (vocabulary, recipe.model.pretrained)):
        folder = Path(place) if Path(place).is_dir() else Path(place).parent
        found = {name: folder / name for name in companions.NAMES if (folder / name).is_file()}
        if found:
            return found
    return companions.find(None, weights) if weights else {}

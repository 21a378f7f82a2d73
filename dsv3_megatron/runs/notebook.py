"""A model in a notebook: logits, losses, training steps and texts, in one process that nothing has to start.

    import dsv3_megatron as dsv3

    with dsv3.Model.from_preset("tiny", lr=1e-3) as model:
        logits_BSV = model.logits([[1, 2, 3, 4]])
        step = model.train_step([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
        print(step.loss, step.grad_norm, model.loss([[1, 2, 3, 4, 5]]))
        print(model.generate([1, 2, 3], max_new_tokens=8))

It is made of what the commands are made of: built_model.py builds it and loads it, learner.py takes a step as in a
run, evaluator.py scores rows, and generation/ continues them. Several models may be there at once; none changes
another.

Shapes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv3_megatron.checkpoint.folder import CheckpointError, RunProgress, check_save_directory, latest_iteration
from dsv3_megatron.checkpoint.hf.directory import CONFIG, has_weights
from dsv3_megatron.checkpoint.hf.export import export_run
from dsv3_megatron.checkpoint.open import open_checkpoint
from dsv3_megatron.checkpoint.store import load_checkpoint, save_checkpoint
from dsv3_megatron.checkpoint.text_files import collect_text_files
from dsv3_megatron.config.family_json import model_of_folder
from dsv3_megatron.config.fields import ConfigError, all_divisors
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import preset, run_of_model
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import TrainingConfig
from dsv3_megatron.data.rows import check_token_array
from dsv3_megatron.generation.forward import CachedModel
from dsv3_megatron.generation.generator import Generator, Options
from dsv3_megatron.generation.sampling import Sampling
from dsv3_megatron.generation.text import TextCodec, TextStream, check_text, open_codec
from dsv3_megatron.metrics.parameters import count_parameters
from dsv3_megatron.parallel.groups import destroy_groups
from dsv3_megatron.process.ranks import Processes
from dsv3_megatron.runs.alone import Continuation, StepResult, open_tokenizer, require_memory, settings_alone
from dsv3_megatron.runs.built_model import BuiltModel, LoadInto, build_model
from dsv3_megatron.runs.evaluator import Evaluation, Evaluator, RowSamples
from dsv3_megatron.runs.learner import Learner
from dsv3_megatron.schedule.forward_backward import iterate_chunks


class Model:
    """A whole model in this process, with what a notebook does with one.

    Make one with `Model.from_preset`, `Model.from_hugging_face` or `Model.load`; `Model(run)` takes a configuration.
    Use it in a `with` block, or call `close` when you are done: that frees the memory and the process groups.

    Token ids are rows of equal length, [batch, seq]: lists, a numpy array or a torch tensor of integers.

    Args:
        run: Configuration of a run, whose architecture, optimizer, precision, guards and FP8 settings are used.
        tokenizer: Folder with a tokenizer.json, for texts; None: ids only.

    Attributes:
        run: The configuration in use.
        iteration: Training steps taken, those before `load` with its optimizer included.

    Raises:
        ConfigError: a setting is wrong, the weights do not fit into this machine, or several processes were started.
    """

    def __init__(self, run: RunConfig, *, tokenizer: str | Path | None = None) -> None:
        self._open(settings_alone(run, {}, tokenizer), None, f"fresh weights of seed {run.training.seed}",
                   open_tokenizer(tokenizer, run.model.vocab_size))

    @classmethod
    def from_preset(cls, name: str, *, tokenizer: str | Path | None = None, **fields: Any) -> Model:
        """Build a named model with fresh weights, which depend on the seed alone.

        Args:
            name: "tiny", "laptop", "dsv3-16b", "dsv3-671b", "moonlight-16b" or "kimi-k2".
            tokenizer: Folder with a tokenizer.json, for texts; None: ids only.
            fields: Settings to change, by the names of a run: vocab_size=2048, num_layers=2, lr=1e-3, seed=1,
                precision="fp32".

        Raises:
            ConfigError: no such preset or field, a wrong value, or too little memory.
        """
        return cls._of(preset(name), fields, tokenizer)

    @classmethod
    def from_hugging_face(cls, folder: str | Path, *, tokenizer: str | Path | None = None, **fields: Any) -> Model:
        """Build the model that a Hugging Face folder describes, with the folder's weights if it has any.

        Args:
            folder: Folder with a config.json, or the path of such a file. A file, or a folder without any weights,
                gives a model with fresh weights; `print(model)` says which it is.
            tokenizer: Folder with a tokenizer.json; None: the folder's own, if it has one.
            fields: Settings to change, by the names of a run.

        Raises:
            ConfigError: the folder cannot be read or is of another kind of model, or a setting is wrong.
        """
        path = Path(folder)
        if path.is_dir() and has_weights(path):
            if not (path / CONFIG).is_file():
                raise CheckpointError(f"{path} holds no Hugging Face checkpoint: it has no {CONFIG}; Model.load reads "
                                      "the checkpoints of a run")
            return cls.load(path, tokenizer=tokenizer, **fields)
        run = replace(run_of_model(model_of_folder(path)), from_hf=os.path.abspath(path))
        return cls._of(run, fields, tokenizer)

    @classmethod
    def load(cls, folder: str | Path, *, tokenizer: str | Path | None = None, with_optimizer: bool = False,
             **fields: Any) -> Model:
        """Build a model with the weights of a checkpoint, of a run under any layout or of Hugging Face's kind.

        Args:
            folder: Folder of a run's checkpoints, of which the newest is taken, or with a Hugging Face checkpoint.
            tokenizer: Folder with a tokenizer.json; None: the one that the checkpoint was trained with, if it is there.
            with_optimizer: Go on with the optimizer's state of a run's checkpoint too, and count its steps; otherwise
                the first training step starts a new optimizer.
            fields: Settings to change, by the names of a run. What is not given is as the checkpoint was trained.

        Raises:
            ConfigError: the checkpoint cannot be read or does not fit, or a setting is wrong.
        """
        checkpoint, source = open_checkpoint(str(folder)), str(folder)
        training = TrainingConfig(**{**checkpoint.training, "precision": checkpoint.precision})
        if with_optimizer and checkpoint.load is not None:
            raise ConfigError(f"with_optimizer=True, but load={source} is in Hugging Face's format, which has no "
                              "optimizer; leave it out")
        run = settings_alone(checkpoint.run(source, training), fields, tokenizer)
        try:
            codec = open_codec(source, None if tokenizer is None else str(tokenizer), vocab_size=run.model.vocab_size)
        except ConfigError:
            if tokenizer is not None:
                raise
            codec = None  # ids can be given; what `generate` says of a text names the way out
        model = cls.__new__(cls)
        model._open(run, checkpoint.load, f"weights of {source}", codec)
        if with_optimizer:
            model._load_optimizer(source)
        return model

    @classmethod
    def _of(cls, run: RunConfig, fields: dict[str, Any], tokenizer: str | Path | None) -> Model:
        run = settings_alone(run, fields, tokenizer)
        return cls(run, tokenizer=tokenizer)

    def _open(self, run: RunConfig, load: LoadInto | None, source: str, codec: TextCodec | None) -> None:
        """Build and fill the modules; `run` is as `settings_alone` gives it."""
        world_size = Processes.from_environment().world_size
        if world_size != 1:
            raise ConfigError(f"a Model runs in one process, not {world_size}; start it without torchrun, and use "
                              "dsv3 train for a run of several processes")
        require_memory(run)
        self.run, self.iteration, self._num_samples, self._num_tokens = run, 0, 0, 0
        self._source, self._codec, self._learner, self._saved_in = source, codec, None, set[Path]()
        with torch.random.fork_rng():  # the notebook's own random numbers go on as if nothing had been built
            self._built: BuiltModel | None = build_model(run)
            self._leave = weakref.finalize(self, destroy_groups)
            if load is not None or run.checkpoint.load is not None:
                try:
                    self._built.load(load)
                except ConfigError:
                    self.close()
                    raise

    _learner: Learner | None

    # -- what it is --------------------------------------------------------------------------------

    def __repr__(self) -> str:
        state = f"{self.num_parameters:,} parameters, {self._source}"
        if self.iteration:
            state += f", {self.iteration} training steps"
        return f"<Model {self.run.name}: {state}{'' if self._built is not None else ', closed'}>"

    @property
    def config(self) -> ModelConfig:
        """Architecture of the model."""
        return self.run.model

    @property
    def num_parameters(self) -> int:
        """Number of all trained parameters, MTP modules included."""
        return count_parameters(self.run.model).total

    @property
    def device(self) -> torch.device:
        """Device that the model computes on."""
        return self._alive().device.torch_device

    # -- forward -----------------------------------------------------------------------------------

    def logits(self, token_ids: Any) -> torch.Tensor:
        """Compute the scores of every next token, without gradients.

        Args:
            token_ids: Integers [batch, seq], at most max_position_embeddings in a row.

        Returns:
            fp32 [batch, seq, vocab]; position s scores the token at s + 1. Softmax makes probabilities of them.

        Raises:
            ConfigError: another shape or dtype, a row that is too long, or an id outside the vocabulary.
        """
        tokens_BS = torch.from_numpy(self._rows(token_ids, least=1)).to(self.device)
        (stage,) = self._alive().stages
        positions_BS = torch.arange(tokens_BS.shape[1], device=self.device).expand_as(tokens_BS)
        with torch.no_grad():
            logits_BSV = stage.eval()(input_ids=tokens_BS, position_ids=positions_BS, attention_mask=None, labels=None)
        return logits_BSV.float()

    def evaluate(self, token_ids: Any) -> Evaluation:
        """Score rows as `dsv3 evaluate` does: loss, perplexity and the MTP losses.

        Args:
            token_ids: Integers [batch, seq]; each token but a row's first is predicted from those before it.

        Raises:
            ConfigError: another shape or dtype, a row that is too long, or an id outside the vocabulary.
        """
        rows = self._rows(token_ids, least=2)
        evaluator = Evaluator(self._alive(), self._run_of(rows), shows_progress=False)
        return evaluator.evaluate(rows)

    def loss(self, token_ids: Any) -> float:
        """Compute the mean loss of the next token over rows, in nats; `evaluate` tells more.

        Args:
            token_ids: Integers [batch, seq]; each token but a row's first is predicted from those before it.
        """
        return self.evaluate(token_ids).loss

    # -- training ----------------------------------------------------------------------------------

    def train_step(self, token_ids: Any, *, learning_rate: float | None = None) -> StepResult:
        """Take one optimizer step as a run does: AdamW, clipping, MTP and balance losses, the routers' biases.

        The rows are one global batch, computed in micro-batches of `micro_batch_size` rows or, where that does not
        divide them, of the next smaller number that does.

        Args:
            token_ids: Integers [batch, seq]; a run's sample of seq_length tokens is a row of seq_length + 1.
            learning_rate: Learning rate of this step; None: the `lr` of the settings.

        Raises:
            ConfigError: another shape or dtype, a row that is too long, an id outside the vocabulary, or a learning
                rate that cannot be.
        """
        rows = self._rows(token_ids, least=2)
        run = self._run_of(rows, self.run.training.lr if learning_rate is None else learning_rate)
        run.validate(1)
        plan = run.recipe().step(0, 0)
        assert plan is not None
        samples = RowSamples(rows, seq_length=run.training.seq_length, num_rows_per_step=len(rows))
        learner = self._training()
        taken = learner.take_step(plan, iterate_chunks(samples, run.training, run.parallel, learner.groups),
                                  iteration=self.iteration + 1, first_sample=0)
        self.iteration += 1
        self._num_samples += len(rows)
        self._num_tokens += plan.num_tokens
        assert taken.losses.main is not None
        return StepResult(self.iteration, taken.losses.main, taken.losses.mtp, taken.balance_loss,
                          taken.outcome.grad_norm, plan.learning_rate, taken.outcome.is_applied)

    def _training(self) -> Learner:
        """The learner, made for the first step: its buffers and its optimizer are most of the memory of training."""
        if self._learner is None:
            self._learner = Learner(self._alive())
        return self._learner

    def _load_optimizer(self, folder: str) -> None:
        learner = self._training()
        try:
            with torch.random.fork_rng():
                position = load_checkpoint(folder, self.run, list(learner.chunks), learner.optimizer, learner.groups,
                                           average=learner.average)
        except ConfigError:
            self.close()
            raise
        self.iteration, self._num_samples = position.iteration, position.consumed_samples
        self._num_tokens = position.consumed_tokens

    # -- texts -------------------------------------------------------------------------------------

    def generate(self, prompt: str | Sequence[int], *, max_new_tokens: int = 128, temperature: float = 0.0,
                 top_p: float = 1.0, seed: int = 1234, speculative: str | None = None) -> Continuation:
        """Continue a prompt, as `dsv3 generate` does.

        Args:
            prompt: A text, for which there must be a tokenizer; or token ids.
            max_new_tokens: Tokens at most; a text also ends with its end token, and with the model's context.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_p: Probability that the likeliest tokens, as few as can be, must have together to be kept.
            seed: Seed of the draws.
            speculative: "mtp" lets the MTP module guess a token ahead; None does not.

        Raises:
            ConfigError: a text without a tokenizer, an empty or too long prompt, an id outside the vocabulary, or a
                setting that cannot be.
        """
        stage = self._alive().stages[0]
        ids = self._encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        options = Options(
            max_new_tokens, self.config.max_position_embeddings, Sampling(temperature, top_p, seed),
            speculative=speculative, stop_ids=self._codec.stop_ids if self._codec is not None else ())
        options.validate(self.config.mtp_num_layers)
        options.check_prompt(ids, self.config.vocab_size, "the prompt")
        stream = TextStream(self._codec, ids) if self._codec is not None else None
        new, text, ended = list[int](), "", ""
        for event in Generator(CachedModel(stage.eval()), options).generate([ids]):
            new += event.ids
            ended = event.ended or ""
            text += stream.add(event.ids, is_last=bool(ended)) if stream is not None else ""
        return Continuation(tuple(new), text if stream is not None else None, ended)

    def _encode(self, text: str) -> list[int]:
        if self._codec is None:
            raise ConfigError("there is no tokenizer for a text: give its folder when the model is made, "
                              "tokenizer=DIR, or give token ids")
        check_text(text, "prompt")
        return self._codec.encode(text)

    # -- to disk -----------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint, which `Model.load`, `dsv3 generate`, `dsv3 evaluate` and `dsv3 train --load` read.

        After a training step the optimizer's state is in it too; before, the weights alone.

        Args:
            folder: Folder of checkpoints: a new one, or one that this model has saved to before.

        Returns:
            Folder of this checkpoint within it.

        Raises:
            ConfigError: another model's checkpoints are there, or the folder cannot be written to.
        """
        place = Path(folder).resolve()
        built = self._alive()
        if place.is_dir() and place not in self._saved_in and latest_iteration(place) is not None:
            raise CheckpointError(f"save={folder} has checkpoints of another run or model; choose another folder")
        check_save_directory(folder)
        path = self._write(place, built)
        self._saved_in.add(place)
        return path

    def _write(self, place: Path, built: BuiltModel) -> Path:
        learner, progress = self._learner, RunProgress(self.iteration, self._num_samples, self._num_tokens)
        return save_checkpoint(
            place, progress, self.run, list(built.stages if learner is None else learner.chunks),
            None if learner is None else learner.optimizer, built.groups, keep_last=0,
            average=None if learner is None else learner.average, text_files=collect_text_files(self.run))

    def export(self, folder: str | Path, *, without_mtp: bool = False) -> Path:
        """Write the model as a Hugging Face folder, which Transformers loads.

        A checkpoint is written beside it first and removed again, so the disk must hold the weights twice.

        Args:
            folder: Folder to make.
            without_mtp: Leave the MTP modules out: some programs refuse them.

        Returns:
            The folder.

        Raises:
            ConfigError: the folder is there and not empty, or cannot be written.
        """
        built, output = self._alive(), Path(folder)
        check_save_directory(output.resolve().parent)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.resolve().parent) as between:
            self._write(Path(between), built)
            return export_run(between, str(output), self.iteration, precision=built.precision,
                              is_without_mtp=without_mtp)

    # -- its end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the model's memory, and the process groups unless another model uses them; calls after it are errors."""
        self._built = self._learner = None
        self._leave()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _alive(self) -> BuiltModel:
        if self._built is None:
            raise ConfigError("this model is closed; make another one")
        return self._built

    def _rows(self, token_ids: Any, *, least: int) -> np.ndarray:
        """Rows as int64 [B, S], checked; where S ids predict S - 1, the context has one more."""
        self._alive()
        if isinstance(token_ids, torch.Tensor):
            token_ids = token_ids.detach().cpu().numpy()
        try:
            ids_BS = np.asarray(token_ids)
        except ValueError as error:
            raise ConfigError("token_ids has rows of different lengths; cut them to one length, or give them in "
                              "several calls") from error
        check_token_array(ids_BS, vocab_size=self.config.vocab_size, least=least, name="token_ids",
                          max_length=self.config.max_position_embeddings, has_last=least == 2)
        return ids_BS.astype(np.int64)

    def _run_of(self, rows: np.ndarray, learning_rate: float = 0.0) -> RunConfig:
        """The run whose next step has these rows."""
        size, most = len(rows), self.run.training.micro_batch_size
        return self.run.override(
            seq_length=rows.shape[1] - 1, global_batch_size=size, lr=learning_rate, min_lr=learning_rate,
            micro_batch_size=max(part for part in all_divisors(size) if part <= most))

"""One run from its options to its last checkpoint, in this process: alone, or as one rank of many."""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from ckpt_tools import convert
from llama_model import LlamaModel, flops, init_weights, load_weights, parallel
from npu_kernels import Device, device, require_fused
from tqdm import tqdm

from trainer import header, metrics, output
from trainer.checkpoints import Checkpoints
from trainer.config import PRETRAINING_ONLY, TrainConfig, changed, flag
from trainer.data import DataOrder, Loader, check_split, check_vocabulary, data_files, sample_numbers, training_data
from trainer.engines import Engine, StepResult
from trainer.engines.megatron import MegatronEngine
from trainer.errors import TerminatedError, TrainerError
from trainer.progress import FILE as PROGRESS
from trainer.progress import Progress, schedule_of
from trainer.run import Run
from trainer.start import Start, begin, check_processes

Kind = Literal["pretrain", "finetune"]


def train(config: TrainConfig, kind: Kind = "pretrain") -> Run:
    """The finished run of `config`: every rank calls this, with torchrun's variables set, or a single process without.

    Args:
        config: The options.
        kind: "pretrain" reads a text data set and takes the loss of every token; "finetune" reads the `_packed_` data
            set of an instruction handler, one row a sample, with the loss on the answers' tokens.

    Raises:
        ConfigError: The request contradicts itself, the model, the data or the number of processes.
        TrainerError: The data turned out broken, the loss is no number any more, or there is nothing to resume from.
        TerminatedError: SIGTERM arrived, and the run was saved.
    """
    with begin(config, kind) as start:
        notes = check_data(config, kind, start)
        on = parallel.initialize(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=_chunks_per_stage(config, start),
            device=device(),
            seed=config.seed,
            timeout=timedelta(minutes=config.distributed_timeout_minutes),
        )
        is_first = torch.distributed.get_rank() == 0
        try:
            check_processes(config, torch.distributed.get_world_size(), on.type)
            run = _Job(config, kind, start, on, notes).run()
        finally:
            parallel.destroy()
    if is_first and config.export_hf is not None:  # the others need not wait for it
        print(f"exporting to {config.export_hf}", file=sys.stderr)
        latest = run.checkpoint(config.train_iters)
        convert(latest, config.export_hf, to="hf", dtype=config.dtype, overwrite=config.overwrite)
    return run


def check_data(config: TrainConfig, kind: str, start: Start) -> list[str]:
    """What has to be said about model and data before the run begins.

    Raises:
        ConfigError: They do not fit each other or the options.
    """
    prefixes = data_files(config, kind)
    if kind == "pretrain":
        for prefix in prefixes:
            check_split(config, prefix)
    found = [check_vocabulary(prefix, start.model.vocab_size, start.vocab_sha256) for prefix in prefixes]
    return list(dict.fromkeys(note for note in found if note))


def _chunks_per_stage(config: TrainConfig, start: Start) -> int | None:
    """Chunks of each stage of a virtual pipeline; None for a plain one."""
    if config.num_layers_per_virtual_pipeline_stage is None:
        return None
    return len(config.layout.chunks(start.model.num_layers)[0])


class _Job:
    """The state that one run carries from step to step."""

    def __init__(self, config: TrainConfig, kind: Kind, start: Start, on: Device, notes: list[str]) -> None:
        self._config, self._kind, self._start, self._device = config, kind, start, on
        self._run = Run(config.output_dir)
        self._first = torch.distributed.get_rank() == 0
        self._world = torch.distributed.get_world_size()
        self._iteration, self._consumed = 0, 0
        self._take_folder()
        progress = start.progress
        if progress:
            self._iteration, self._consumed = progress.iteration, progress.consumed_samples
        with self._index_cache() as cache:
            data = training_data(
                config,
                kind,
                start.model,
                cache=cache,
                stored=DataOrder.from_dict(progress.order) if progress else None,
                num_samples=self._consumed + (config.train_iters - self._iteration) * config.global_batch_size,
            )
        self._order = data.order
        self._train, self._valid = self._loader(data.train), self._loader(data.valid) if data.valid else None
        self._engine = self._make_engine()
        if progress:
            self._resume(progress)
        self._checkpoints = Checkpoints(
            self._run,
            self._engine,
            keep_last=config.keep_last,
            in_background=config.async_save,
            is_first_rank=self._first,
            barrier=torch.distributed.barrier,
        )
        self._throughput = metrics.Throughput(
            seq_length=config.seq_length,
            global_batch_size=config.global_batch_size,
            num_devices=self._world,
            flops_per_token=flops.model_flops_per_token(start.model, config.seq_length),
            peak_flops=on.peak_flops(getattr(torch, config.dtype)),
        )
        for note in (*notes, *data.notes, *self._notes()):
            self._say(f"warning: {note}")
        require_fused(config.require_fused)
        for line in header.lines(config, start, data.order, on, self._world):
            self._say(line)

    def run(self) -> Run:
        """Every step, every checkpoint."""
        config = self._config
        began, first = time.perf_counter(), self._iteration
        with ExitStack() as stack:
            sinks = stack.enter_context(metrics.sinks(self._run.metrics_file, config.tensorboard_dir, self._first))
            bar = stack.enter_context(self._bar())
            stop = stack.enter_context(_stop_signal())
            while self._iteration < config.train_iters:
                result, line = self._step(stop)
                if self._is_due(config.eval_interval):
                    line |= self._validate()
                sinks.write(line)
                bar.update()
                bar.set_postfix(loss=line["loss"], refresh=False)
                spent = time.perf_counter() - began
                left = spent / (self._iteration - first) * (config.train_iters - self._iteration)
                self._report(line, left, is_first=self._iteration == first + 1)
                if self._is_due(config.save_interval) or result.stop_asked:
                    self._save()
                self._announce(self._checkpoints.finish(wait=False))
                if result.stop_asked and self._iteration < config.train_iters:
                    self._end_early()
            self._announce(self._checkpoints.finish(wait=True))
        torch.distributed.barrier()
        self._engine.close()
        return self._run

    def _step(self, stop: "_Stop") -> tuple[StepResult, dict[str, Any]]:
        """One optimizer step and its record."""
        size = self._config.global_batch_size
        began = time.perf_counter()
        result = self._engine.train_step(self._train.step(self._consumed), stop.asked)
        self._device.synchronize()
        rates = self._throughput.rates(time.perf_counter() - began)
        self._check(result)
        self._iteration += 1
        self._consumed += size
        line = metrics.record(self._iteration, self._consumed, result, rates)
        memory = self._device.max_memory_bytes()
        return result, line | ({"max_memory_bytes": memory} if memory is not None else {})

    def _check(self, result: StepResult) -> None:
        """Stops before a checkpoint could keep weights that a broken step has made.

        Raises:
            TrainerError: Loss or gradient is no number, or nothing of the batch has a loss.
        """
        step = self._iteration + 1
        samples = self._train.names(self._consumed)
        if result.bad_microbatch is not None:
            begin = self._consumed + result.bad_microbatch * self._config.micro_batch_size
            samples = sample_numbers(begin, self._config.micro_batch_size)
        way_out = "lower --lr or look at the data; earlier checkpoints are as they were"
        if step == 1:
            way_out = f"look at the data, and at the weights of {self._start.path}"
        if not math.isfinite(result.loss):  # in float16 too: no loss scale is in it
            raise TrainerError(f"the loss of step {step} is {result.loss} ({samples}): {way_out}")
        if not math.isfinite(result.grad_norm) and not result.skipped:
            raise TrainerError(f"the gradient of step {step} has the norm {result.grad_norm} ({samples}): {way_out}")
        if result.skipped and result.loss_scale <= self._config.min_loss_scale:
            raise TrainerError(
                f"step {step} overflowed float16 at the smallest loss scale, {result.loss_scale:g} ({samples}): take "
                "--bf16, or lower --lr or --min-loss-scale; earlier checkpoints are as they were"
            )
        if not result.loss_tokens:
            raise TrainerError(
                f"step {step} has no token with a loss ({samples}): do the answers lie behind --seq-length "
                f"{self._config.seq_length}?"
            )

    def _validate(self) -> dict[str, float]:
        """The validation loss after a step, on the same samples each time; nothing where there is no validation."""
        if self._valid is None:
            return {}
        loss = tokens = 0.0
        for number in range(self._config.eval_iters):
            part = self._engine.evaluate(self._valid.step(number * self._config.global_batch_size))
            loss, tokens = loss + part[0], tokens + part[1]
        if not math.isfinite(loss):
            raise TrainerError(
                f"the validation loss after step {self._iteration} is {loss}: lower --lr, or look at the validation's "
                "share of the data; earlier checkpoints are as they were"
            )
        return {"valid_loss": loss / max(tokens, 1)}

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if not self._engine.has_finite_weights():
            raise TrainerError(
                f"weights are no numbers any more after step {self._iteration}, which is not saved: lower --lr "
                f"{self._config.lr} or --weight-decay {self._config.weight_decay}"
            )
        self._announce(self._checkpoints.finish(wait=True))  # one in the background may not be done yet
        self._checkpoints.begin(self._iteration, self._describe)

    def _describe(self, folder: Path) -> None:
        """Makes a checkpoint a whole MODEL, and one to resume from: its architecture, its tokenizer, its progress."""
        content = json.dumps(self._start.model.to_hf(self._config.dtype), indent=2) + "\n"
        (folder / "config.json").write_text(content, "utf-8")
        for name, data in self._start.tokenizer.items():
            (folder / name).write_bytes(data)
        if self._config.save_optimizer:
            self._progress().write(folder)

    def _progress(self) -> Progress:
        return Progress(
            iteration=self._iteration,
            consumed_samples=self._consumed,
            kind=self._kind,
            dtype=self._config.dtype,
            schedule=schedule_of(self._config),
            engine=self._engine.state(),
            order=self._order.to_dict(),
        )

    def _announce(self, folder: Path | None) -> None:
        if folder is None:
            return
        if self._first:
            output.forget_replaced(self._run)
        self._say(f"checkpoint {folder}")

    def _end_early(self) -> None:
        """What SIGTERM asks for.

        Raises:
            TerminatedError: Always.
        """
        self._announce(self._checkpoints.finish(wait=True))
        raise TerminatedError(
            f"terminated after step {self._iteration}, which is saved: go on with --resume {self._run.path}"
        )

    # --- making the parts -------------------------------------------------------------------------------------------

    def _take_folder(self) -> None:
        """Checks the run's folder on every rank before the first one writes into it."""
        output.check_output(self._config)
        torch.distributed.barrier()
        if self._first:
            progress = self._start.progress
            self._held = output.take(self._config, progress.iteration if progress else 0)
        torch.distributed.barrier()

    @contextmanager
    def _index_cache(self) -> Iterator[Path]:
        """The folder for megatron-core's indices, which are built within: without halves that a kill has left."""
        whole = self._run.cache / "complete"
        if self._first:
            if whole.exists():
                whole.unlink()
            else:
                shutil.rmtree(self._run.cache, ignore_errors=True)
        torch.distributed.barrier()
        yield self._run.cache
        if self._first:
            self._run.cache.mkdir(exist_ok=True)
            whole.touch()

    def _notes(self) -> Iterator[str]:
        """What may not be meant as it stands."""
        config = self._config
        if self._consumed >= config.decay_iters * config.global_batch_size and config.lr_decay_style != "constant":
            yield (
                f"the schedule is over since step {config.decay_iters}: the rest runs at --min-lr {config.min_lr:g}; "
                "--override-opt-param-scheduler --lr-decay-iters N changes that"
            )
        if self._kind == "finetune":
            for name in changed(config, PRETRAINING_ONLY):
                yield f"{flag(name)} has no effect: it is for pretraining"

    def _make_engine(self) -> Engine:
        config, model = self._config, self._start.model
        if config.mode == "ptd":
            return MegatronEngine(config, model, self._device, self._fill)
        from trainer.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, model, self._device, self._fill)

    def _fill(self, chunk: LlamaModel, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """A chunk's weights; an engine that resumes from its own files reads them later, with the optimizer's."""
        if self._start.checkpoint is not None:
            load_weights(chunk, self._start.checkpoint, parameters)
        elif self._start.progress is None:
            init_weights(chunk, self._config.seed, parameters)

    def _resume(self, progress: Progress) -> None:
        self._check_files(self._start.path)
        self._engine.load(self._start.path)
        try:
            self._engine.load_state(progress.engine)
        except (KeyError, TypeError, ValueError) as error:
            raise TrainerError(f"{self._start.path / PROGRESS} is damaged: engine: {error!r}") from None
        self._say(f"resumed from {self._start.path} after step {self._iteration}")

    def _check_files(self, folder: Path) -> None:
        """All ranks together compare the checkpoint's files with its manifest.

        Raises:
            TrainerError: One of them is missing or damaged.
        """
        from trainer.hashes import damage

        found: list[str | None] = [None] * self._world
        torch.distributed.all_gather_object(found, damage(folder, torch.distributed.get_rank(), self._world))
        for line in found:
            if line is not None:
                raise TrainerError(f"{line}; resume from an earlier checkpoint")

    def _loader(self, samples: Any) -> Loader:
        config = self._config
        dp_size = config.data_parallel_size(self._world)
        return Loader(
            samples=samples,
            vocab_size=self._start.model.vocab_size,
            micro_batch_size=config.micro_batch_size,
            num_microbatches=config.num_microbatches(self._world),
            # Ranks count tensor-parallel first, then data-parallel, then pipeline.
            dp_rank=torch.distributed.get_rank() // config.tensor_model_parallel_size % dp_size,
            dp_size=dp_size,
        )

    # --- talking ----------------------------------------------------------------------------------------------------

    def _is_due(self, interval: int) -> bool:
        return self._iteration == self._config.train_iters or bool(interval and self._iteration % interval == 0)

    def _report(self, line: dict[str, Any], eta_s: float, *, is_first: bool) -> None:
        config = self._config
        if self._iteration % config.log_interval == 0 or is_first or self._iteration == config.train_iters:
            self._say(metrics.console_line(line, config.train_iters, eta_s))
        if "valid_loss" in line:
            perplexity = metrics.perplexity(line["valid_loss"])
            self._say(
                f"step {self._iteration} | validation loss {line['valid_loss']:.4f} | perplexity {perplexity:.2f}"
            )

    def _bar(self) -> "tqdm[None]":
        off = True if not self._first else None  # None: off where stderr is no terminal
        total, done = self._config.train_iters, self._iteration
        return tqdm(total=total, initial=done, unit="step", disable=off, dynamic_ncols=True, file=sys.stderr)

    def _say(self, text: str) -> None:
        if self._first:
            tqdm.write(text, file=sys.stderr)  # above the progress bar, where there is one


class _Stop:
    """Whether this process was asked to stop."""

    asked = False


@contextmanager
def _stop_signal() -> Iterator[_Stop]:
    """Within it SIGTERM asks for an end after the current step, instead of ending the process."""
    stop = _Stop()

    def ask(*_: object) -> None:
        stop.asked = True

    try:
        before = signal.signal(signal.SIGTERM, ask)
    except ValueError:  # not the main thread: signals are its caller's
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)

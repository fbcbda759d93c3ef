"""One run from its options to its last checkpoint, in this process: alone, or as one rank of many."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Literal, TextIO

import torch
from ckpt_tools import Checkpoint, open_checkpoint
from data_prep import Tokenizer
from llama_model import flops, parallel
from npu_kernels import Device, backends, device, require_fused
from tqdm import tqdm

from trainer import checkpoints, metrics
from trainer.config import TrainConfig, write_yaml
from trainer.data import (
    InstructionSamples,
    Loader,
    Samples,
    check_split,
    check_vocabulary,
    data_files,
    pretraining_samples,
)
from trainer.engines import Engine
from trainer.engines.megatron import MegatronEngine, params_dtype
from trainer.errors import ConfigError, TrainerError
from trainer.run import Run

Kind = Literal["pretrain", "finetune"]


def train(config: TrainConfig, kind: Kind = "pretrain") -> Run:
    """The finished run of `config`: every rank calls this, with torchrun's variables set, or a single process without.

    Args:
        config: The options.
        kind: "pretrain" reads a text data set and takes the loss of every token; "finetune" reads the `_packed_` data
            set of an instruction handler, one row a sample, with the loss on the answers' tokens.

    Raises:
        ConfigError: The request contradicts itself, the model, the data or the number of processes.
        TrainerError: The data turned out broken, or the loss is no number any more.
    """
    run = Run(config.output_dir)
    with open_checkpoint(config.load_weights) as checkpoint:
        prefixes = data_files(config, kind)
        if kind == "pretrain":
            check_split(config, prefixes[0])
        notes = _check_model(config, checkpoint, prefixes)
        on = parallel.initialize(
            tensor_model_parallel_size=config.tensor_model_parallel_size, device=device(), seed=config.seed
        )
        try:
            return _Job(config, kind, run, checkpoint, on, notes).run()
        finally:
            parallel.destroy()


def _check_model(config: TrainConfig, checkpoint: Checkpoint, prefixes: list[Path]) -> list[str]:
    """What has to be said about model and data before the run begins.

    Raises:
        ConfigError: They do not fit each other or the options.
    """
    model = checkpoint.config
    config.check_model(model)
    sha256 = Tokenizer.find(config.load_weights).vocab_sha256 if checkpoint.tokenizer_files else None
    found = [check_vocabulary(prefix, model.vocab_size, sha256) for prefix in prefixes]
    return list(dict.fromkeys(note for note in found if note))


class _Job:
    """The state that one run carries from step to step."""

    def __init__(
        self, config: TrainConfig, kind: Kind, run: Run, checkpoint: Checkpoint, on: Device, notes: list[str]
    ) -> None:
        self._config, self._run, self._device, self._checkpoint = config, run, on, checkpoint
        self._first = torch.distributed.get_rank() == 0
        self._world = torch.distributed.get_world_size()
        dp_size = config.data_parallel_size(self._world)
        checkpoints.check_output(run, config.overwrite, (config.load_weights, config.data_path))
        self._barrier()  # every rank has looked before the first one writes
        if self._first:
            checkpoints.create(run)
            write_yaml(config, run.config_file)
        self._barrier()
        train, valid = self._samples(kind, notes)
        self._train, self._valid = (self._loader(samples, dp_size) if samples else None for samples in (train, valid))
        self._engine: Engine = MegatronEngine(config, checkpoint, on)
        self._throughput = metrics.Throughput(
            seq_length=config.seq_length,
            global_batch_size=config.global_batch_size,
            num_devices=self._world,
            flops_per_token=flops.model_flops_per_token(checkpoint.config, config.seq_length),
            peak_flops=on.peak_flops(params_dtype(config)),
        )
        for note in notes:
            self._say(f"warning: {note}")
        require_fused(config.require_fused)
        kernels = (f"{op} by {backend}" for op, backend in backends(on.type).items())
        self._say(f"kernels on {on.type}: {', '.join(kernels)}")

    def run(self) -> Run:
        """Every step, every checkpoint."""
        config = self._config
        started = time.perf_counter()
        with self._metrics_file() as file, self._bar() as bar:
            for step in range(1, config.train_iters + 1):
                line = self._step(step)
                if self._is_due(step, config.eval_interval):
                    line |= self._validate(step)
                if self._first:
                    metrics.write(file, line)
                    bar.update()
                    bar.set_postfix(loss=line["loss"], refresh=False)
                if step % config.log_interval == 0 or step in (1, config.train_iters):
                    spent = time.perf_counter() - started
                    eta = spent / step * (config.train_iters - step)
                    self._say(metrics.console_line(line, config.train_iters, eta))
                if "valid_loss" in line:
                    self._say(f"step {step} | validation loss {line['valid_loss']:.4f}")
                if self._is_due(step, config.save_interval):
                    self._save(step)
        return self._run

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step's record."""
        assert self._train is not None
        size = self._config.global_batch_size
        begin = time.perf_counter()
        result = self._engine.train_step(self._train.step((step - 1) * size))
        self._device.synchronize()
        rates = self._throughput.rates(time.perf_counter() - begin)
        if not math.isfinite(result.loss) and not result.skipped:
            raise TrainerError(
                f"the loss of step {step} is {result.loss} (samples {(step - 1) * size} to {step * size - 1}): "
                f"lower --lr {self._config.lr} or look at the data; earlier checkpoints are as they were"
            )
        if not result.loss_tokens:
            raise TrainerError(
                f"step {step} has no token with a loss (samples {(step - 1) * size} to {step * size - 1}): do the "
                f"answers lie behind --seq-length {self._config.seq_length}?"
            )
        line = metrics.record(step, step * size, result, rates)
        memory = self._device.max_memory_bytes()
        return line | ({"max_memory_bytes": memory} if memory is not None else {})

    def _validate(self, step: int) -> dict[str, float]:
        """The validation loss after `step`, on the same samples each time; nothing where there is no validation."""
        if self._valid is None:
            return {}
        loss = tokens = 0.0
        for number in range(self._config.eval_iters):
            part = self._engine.evaluate(self._valid.step(number * self._config.global_batch_size))
            loss, tokens = loss + part[0], tokens + part[1]
        return {"valid_loss": loss / max(tokens, 1)}

    def _save(self, step: int) -> None:
        folder = checkpoints.commit(
            self._run, step, self._engine.save, self._describe, is_first_rank=self._first, barrier=self._barrier
        )
        if self._first:
            checkpoints.forget_replaced(self._run)
        self._say(f"step {step} | checkpoint {folder}")

    def _describe(self, folder: Path) -> None:
        """Makes a checkpoint a whole MODEL: its architecture and its tokenizer."""
        dtype = str(params_dtype(self._config)).removeprefix("torch.")
        content = json.dumps(self._checkpoint.config.to_hf(dtype), indent=2) + "\n"
        (folder / "config.json").write_text(content, "utf-8")
        checkpoints.copy_files(self._checkpoint.tokenizer_files, folder)

    # --- making the parts -----------------------------------------------------------------------------------

    def _samples(self, kind: Kind, notes: list[str]) -> tuple[Samples, Samples | None]:
        config, model = self._config, self._checkpoint.config
        eod = config.eod_token_id if config.eod_token_id is not None else model.eos_token_id
        if eod is None:
            raise ConfigError(f"{config.load_weights} names no eos_token_id: give --eod-token-id")
        if kind == "pretrain":
            return pretraining_samples(config, vocab_size=model.vocab_size, eod_token_id=eod, cache=self._run.cache)
        samples = InstructionSamples(config.data_path, config.seq_length, eod, config.seed)
        if samples.num_cut:
            notes.append(f"{samples.num_cut} of {len(samples)} rows are cut to --seq-length {config.seq_length}")
        return samples, None

    def _loader(self, samples: Samples, dp_size: int) -> Loader:
        rank = torch.distributed.get_rank() // self._config.tensor_model_parallel_size
        return Loader(
            samples=samples,
            vocab_size=self._checkpoint.config.vocab_size,
            micro_batch_size=self._config.micro_batch_size,
            num_microbatches=self._config.num_microbatches(self._world),
            dp_rank=rank % dp_size,
            dp_size=dp_size,
        )

    def _is_due(self, step: int, interval: int) -> bool:
        return step == self._config.train_iters or bool(interval and step % interval == 0)

    def _metrics_file(self) -> TextIO:
        return open(self._run.metrics_file if self._first else "/dev/null", "a", encoding="utf-8")

    def _bar(self) -> "tqdm[None]":
        off = True if not self._first else None  # None: off where stderr is no terminal
        return tqdm(total=self._config.train_iters, unit="step", disable=off, dynamic_ncols=True, file=sys.stderr)

    def _say(self, text: str) -> None:
        if self._first:
            tqdm.write(text, file=sys.stderr)  # above the progress bar, where there is one

    def _barrier(self) -> None:
        torch.distributed.barrier()

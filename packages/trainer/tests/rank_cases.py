"""What the ranks of the engine's tests run; imported by their processes."""

import gc
import json
from pathlib import Path

import torch
from ckpt_tools import open_checkpoint
from llama_model import load_weights, parallel
from torch import distributed
from trainer import TrainConfig
from trainer.checkpoints import Checkpoints
from trainer.data import Batch
from trainer.hashes import damage
from trainer.run import Run

OPTIMIZER = dict(lr=1e-3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-5, clip_grad=0.5)
SAMPLES, LENGTH = 8, 24


def config_of(folder, **options):
    """A configuration around in-memory batches: the paths are never read."""
    needed = dict(
        data_path=(Path("none"),), output_dir=Path("none"), load_weights=folder, train_iters=100,
        seq_length=LENGTH, global_batch_size=SAMPLES, micro_batch_size=2,
        lr_decay_style="constant", initial_loss_scale=2.0**8,
    )  # fmt: skip
    return TrainConfig(**{**needed, **OPTIMIZER, **options})


def engine_class(mode):
    if mode == "ptd":
        from trainer.engines.megatron import MegatronEngine

        return MegatronEngine
    from trainer.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine


class Trainer:
    """The engine on a layout, taken down at the end. Weights are those of `folder`, or of the checkpoint `resume`, but
    for one that the engine reads itself."""

    def __init__(self, folder, resume=None, **options):
        from npu_kernels import device

        self.config = config = config_of(folder, **options)
        with open_checkpoint(folder) as checkpoint:
            per_stage = config.num_layers_per_virtual_pipeline_stage
            chunks = len(config.layout.chunks(checkpoint.config.num_layers)[0]) if per_stage else None
            parallel.initialize(
                tensor_model_parallel_size=config.tensor_model_parallel_size,
                pipeline_model_parallel_size=config.pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=chunks,
            )
            model = checkpoint.config
        with open_checkpoint(resume or folder, model) as checkpoint:
            reads_itself = resume and config.mode == "ptd" and checkpoint.format == "torch_dist"

            def fill(chunk, parameters):
                if not reads_itself:
                    load_weights(chunk, checkpoint, parameters)

            self.engine = engine_class(config.mode)(config, model, device(), fill)
        self.dp_size = config.data_parallel_size(distributed.get_world_size())
        self.dp_rank = distributed.get_rank() // config.tensor_model_parallel_size % self.dp_size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.engine.close()
        parallel.destroy()

    def batches(self, tokens, labels):
        """This rank's micro-batches, dealt as `trainer.data.Loader` deals them."""
        size = self.config.micro_batch_size
        for begin in range(self.dp_rank * size, len(tokens), self.dp_size * size):
            rows = slice(begin, begin + size)
            yield Batch(tokens=tokens[rows], labels=labels[rows])

    def step(self, tokens, labels, stop=False):
        return self.engine.train_step(self.batches(tokens, labels), stop)

    def gradients(self, tokens, labels):
        """Every parameter's whole gradient as it stands before clipping, by canonical name."""
        for chunk in self.engine._chunks:
            chunk.zero_grad_buffer()
        self.engine._run(self.batches(tokens, labels), forward_only=False)
        return {name: parameter.main_grad.clone() for name, parameter in self.parameters()}

    def parameters(self):
        for chunk in self.engine.chunks:
            for name, parameter in chunk.named_parameters():
                parts = name.split(".")
                if parts[:2] == ["decoder", "layers"]:
                    parts[2] = str(int(parts[2]) + chunk.first_layer)
                yield ".".join(parts), parameter


def errors(trainer, tensors, expected_folder, *, relative):
    """Each tensor's largest difference from this rank's shard of the expected one."""
    found = {}
    chunk = trainer.engine.chunks[0]
    size, rank = chunk.tensor_model_parallel_size, chunk.tensor_model_parallel_rank
    with open_checkpoint(expected_folder) as expected:
        for name, tensor in tensors.items():
            shard = torch.from_numpy(expected.read_shard(name, rank, size, padded_vocab_size=chunk.padded_vocab_size))
            true = len(shard)
            if "embed" in name or "output_layer" in name:  # padding rows are neither trained nor compared
                true = min(true, max(0, expected.config.vocab_size - rank * true))
            scale = torch.from_numpy(expected.read(name)).abs().max() if relative else 1.0
            difference = (tensor.detach().float() - shard)[:true].abs()
            found[name] = (difference.max() / scale).item() if true else 0.0
    return found


def train(case, options):
    """Loss and norm of every step, the worst error of a gradient of the first step and of a weight after the last."""
    with Trainer(case.folder, **options) as trainer:
        gradient = 0.0
        if not options.get("use_distributed_optimizer"):  # where each rank has its share of them only
            found = trainer.gradients(*case.batches[0])
            gradient = max(errors(trainer, found, case.gradients, relative=True).values())
        steps = [trainer.step(*batch) for batch in case.batches]
        history = [(step.loss, step.grad_norm) for step in steps]
        with trainer.engine._whole_weights():
            weights = errors(trainer, dict(trainer.parameters()), case.weights, relative=False)
        return history, gradient, max(weights.values())


def threads_left(case, options):
    """Threads of this process after each of three runs."""
    counts = []
    for _ in range(3):
        with Trainer(case.folder, **options) as trainer:
            trainer.step(*case.batches[0])
        del trainer
        gc.collect()
        counts.append(len(list(Path("/proc/self/task").iterdir())))
    return counts


def first_gradient_error(case, options, folder):
    """The worst gradient error with another folder's weights: for controls."""
    with Trainer(folder, **options) as trainer:
        gradients = trainer.gradients(*case.batches[0])
        return max(errors(trainer, gradients, case.gradients, relative=True).values())


# --- checkpoints -------------------------------------------------------------------------------------------------


def checkpoints_of(trainer, home, in_background=False, keep_last=0):
    run = Run(Path(home))
    if distributed.get_rank() == 0:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    return Checkpoints(
        run, trainer.engine, keep_last=keep_last, in_background=in_background,
        is_first_rank=distributed.get_rank() == 0, barrier=distributed.barrier,
    )  # fmt: skip


def save(trainer, home, iteration, in_background=False):
    """The committed folder; the engine's own state beside it."""
    state = trainer.engine.state()

    def describe(folder):
        (folder / "state.json").write_text(json.dumps(state), "utf-8")

    checkpoints = checkpoints_of(trainer, home, in_background)
    checkpoints.begin(iteration, describe)
    return checkpoints


def load(trainer, folder):
    trainer.engine.load(Path(folder))
    trainer.engine.load_state(json.loads((Path(folder) / "state.json").read_text("utf-8")))


def history_of(trainer, batches):
    steps = [trainer.step(*batch) for batch in batches]
    return [(step.loss, step.grad_norm, step.lr, step.loss_scale) for step in steps]


def straight(case, options, home, in_background):
    """A run of 13 steps that saves after the third: the history of the last ten."""
    with Trainer(case.folder, **options) as trainer:
        history_of(trainer, case.batches[:3])
        checkpoints = save(trainer, home, 3, in_background)
        if not in_background:
            checkpoints.finish(wait=True)
        history = history_of(trainer, case.batches[3:13])  # while a writer in the background still reads
        checkpoints.finish(wait=True)
        save(trainer, home, 13).finish(wait=True)
        return history


def resumed(case, options, source, home):
    """The last ten steps after a resume, saved at once and at the end: (history, whether no file was damaged)."""
    folder = Path(source) / "checkpoints" / "iter_0000003"
    with Trainer(case.folder, resume=folder, **options) as trainer:
        intact = damage(folder, distributed.get_rank(), distributed.get_world_size()) is None
        load(trainer, folder)
        save(trainer, home, 3).finish(wait=True)
        history = history_of(trainer, case.batches[3:13])
        save(trainer, home, 13).finish(wait=True)
        return history, intact

"""What the ranks of zero mode's tests run; imported by their processes."""

import contextlib
import copy
import json
import random
import re
from types import SimpleNamespace

import rank_cases
import torch
from ckpt_tools import CheckpointError
from llama_model import parallel
from trainer.engines import deepspeed_adaptor, deepspeed_state, megatron_state


def whole(engine):
    """Every parameter of this rank's part of the model, by canonical name; what ZeRO shares out is gathered."""
    import deepspeed

    for name, parameter in engine.chunks[0].named_parameters():
        shared = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if shared else contextlib.nullcontext():
            yield name, parameter.detach().clone()


def train(case, options):
    """Loss and norm of every step, and the worst error of a weight after the last."""
    with rank_cases.Trainer(case.folder, mode="zero", **options) as trainer:
        steps = [trainer.step(*batch) for batch in case.batches]
        history = [(step.loss, step.grad_norm) for step in steps]
        weights = rank_cases.errors(trainer, dict(whole(trainer.engine)), case.weights, relative=False)
        return history, max(weights.values())


def evaluated(case, options):
    """The validation loss a token of the first batch, and the training loss of the same."""
    with rank_cases.Trainer(case.folder, mode="zero", **options) as trainer:
        loss, tokens = trainer.engine.evaluate(trainer.batches(*case.batches[0]))
        step = trainer.step(*case.batches[0], stop=torch.distributed.get_rank() == 0)
        return loss / tokens, step.loss, step.stop_asked


def norm_of_many(case, options):
    """The norm of three million numbers as the optimizer in bfloat16 takes it."""
    with rank_cases.Trainer(case.folder, mode="zero", **options):
        from deepspeed.runtime import bf16_optimizer

        many = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
        ours = bf16_optimizer.get_global_norm_of_tensors(input_tensors=[many], mpu=None, norm_type=2)
        return {"ours": ours.item(), "torch": many.norm().item(), "exact": many.double().norm().item()}


def refused_resume(case, options, source):
    """Why a checkpoint is not gone on with, but for the name of the parameter."""
    with rank_cases.Trainer(case.folder, resume=source, **options) as trainer:
        try:
            rank_cases.load(trainer, source)
        except CheckpointError as error:
            return re.sub(r"weights of \S+", "weights of one", str(error))


def scales(count):
    """By source, target and state: how many steps without an overflow it takes until the loss scale doubles, and how
    many overflows until it halves, in the scaler that went through random ones and in the one that took its state.
    """
    deepspeed_adaptor.imported(parallel.initialize())
    try:
        draw, found = random.Random(0), []
        for _ in range(count):
            overflows = [draw.random() < 0.4 for _ in range(draw.randint(0, 12))]
            for source in ENGINES:
                first = ENGINES[source][0]()
                for overflow in overflows:
                    update(first, overflow)
                saved = json.loads(json.dumps(ENGINES[source][1].progress(first)))
                for target, (make, states) in ENGINES.items():
                    second = make()
                    states.set_progress(second, saved)
                    found.append((source, target, *(ahead(scaler) for scaler in (first, second))))
        return found
    finally:
        parallel.destroy()


def of_deepspeed():
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2.0**20, 3, 1.0, 2, False, raise_error_at_min_scale=False)
    return SimpleNamespace(optimizer=SimpleNamespace(state={}), loss_scaler=scaler)


def of_megatron():
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    scaler = DynamicGradScaler(2.0**20, 1.0, 2.0, 0.5, 3, 2)
    return SimpleNamespace(optimizer=SimpleNamespace(state={}, param_groups=[]), grad_scaler=scaler)


ENGINES = {"deepspeed": (of_deepspeed, deepspeed_state), "megatron": (of_megatron, megatron_state)}


def update(optimizer, overflow):
    scaler = getattr(optimizer, "loss_scaler", None)
    scaler.update_scale(overflow) if scaler else optimizer.grad_scaler.update(overflow)


def scale(optimizer):
    scaler = getattr(optimizer, "loss_scaler", None)
    return float(scaler.cur_scale) if scaler else optimizer.grad_scaler.scale.item()


def ahead(optimizer):
    """The scale, steps until it doubles, overflows until it halves: of copies."""
    counts = []
    for overflow in (False, True):
        other, number = copy.deepcopy(optimizer), 0
        while scale(other) == scale(optimizer) and number < 100:
            update(other, overflow)
            number += 1
        counts.append(number)
    return scale(optimizer), *counts


def bytes_held(case, options):
    """Bytes of weights, gradients and optimizer state on this rank, from its tensors.

    Gradients are counted between two micro-batches: at the end of a step every stage keeps this rank's share only.
    """
    with rank_cases.Trainer(case.folder, mode="zero", **options) as trainer:
        engine = trainer.engine
        inner, batches = engine._engine, trainer.batches(*case.batches[0])
        inner.backward(engine._loss(next(batches)), scale_wrt_gas=False)
        assert not inner.is_gradient_accumulation_boundary()
        parameters = list(engine.chunks[0].parameters())
        weights = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
        # Stage 1 puts the sum of several micro-batches aside.
        gradients = [getattr(parameter, name, None) for parameter in parameters for name in ("grad", "grad_accum")]
        gradients = [gradient for gradient in gradients if gradient is not None]
        if hasattr(inner.optimizer, "grad_partitions_flat_buffer"):  # of stage 3
            gradients.append(inner.optimizer.grad_partitions_flat_buffer)
        elif engine._config.zero_stage == 2:
            gradients += [gradient for group in inner.optimizer.all_grad_tensors.values() for gradient in group or ()]
        held = {"weights": size(weights), "gradients": size(gradients)}
        inner.step()
        for batch in batches:
            inner.backward(engine._loss(batch), scale_wrt_gas=False)
            inner.step()
        states = inner.optimizer.optimizer.state
        return held | {"optimizer": size([tensor for state in states.values() for tensor in state.values()])}


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.dim())


def saved_again(case, options, source, home):
    """Resumes a checkpoint of any engine and saves it at once; the engine's state."""
    with rank_cases.Trainer(case.folder, resume=source, **options) as trainer:
        rank_cases.load(trainer, source)
        rank_cases.save(trainer, home, 3).finish(wait=True)
        return trainer.engine.state()


def opened_by_deepspeed(case, options, source):
    """The last ten steps after DeepSpeed's own loader has read the folder."""
    with rank_cases.Trainer(case.folder, mode="zero", **options) as trainer:
        path, _ = trainer.engine._engine.load_checkpoint(str(source.parent), tag=source.name)
        assert path is not None
        return rank_cases.history_of(trainer, case.batches[3:13])

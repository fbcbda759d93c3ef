"""The layouts in which one and the same run is compared: pairs of options by default, all of them in the matrix."""

import itertools

CHOICES = {
    "tp": (dict(), dict(tensor_model_parallel_size=2), dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp": (
        dict(),
        dict(pipeline_model_parallel_size=2),
        dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
        dict(pipeline_model_parallel_size=2, num_layer_list=(3, 1)),
    ),
    "optimizer": (
        dict(),
        dict(use_distributed_optimizer=True),
        dict(overlap_grad_reduce=True),
        dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    ),
    "recompute": (
        dict(),
        dict(recompute_granularity="full", recompute_num_layers=2),
        dict(recompute_granularity="full", recompute_method="block"),
        dict(recompute_granularity="selective", recompute_modules=("core_attn", "mlp")),
    ),
    "micro": (dict(micro_batch_size=1), dict(micro_batch_size=2)),
    "groups": (dict(groups="gqa"), dict(groups="mha")),
}
"""Every choice of every option; `groups` names the model."""


def every():
    """All combinations, in a fixed order."""
    for parts in itertools.product(*CHOICES.values()):
        yield dict(itertools.chain.from_iterable(part.items() for part in parts))


def pairs():
    """Few combinations in which every choice of an option meets every choice of every other one.

    Greedy: always the combination with the most pairs that no earlier one has.
    """
    names = list(CHOICES)
    numbers = list(itertools.product(*(range(len(CHOICES[name])) for name in names)))

    def met(combination):
        return {(i, combination[i], j, combination[j]) for i, j in itertools.combinations(range(len(names)), 2)}

    missing = set().union(*map(met, numbers))
    while missing:
        best = max(numbers, key=lambda combination: len(met(combination) & missing))
        missing -= met(best)
        parts = (CHOICES[name][number] for name, number in zip(names, best, strict=True))
        yield dict(itertools.chain.from_iterable(part.items() for part in parts))


def title(options):
    """A layout in a few words."""
    words = [options.get("groups", "gqa")]
    if tp := options.get("tensor_model_parallel_size"):
        words.append(f"tp{tp}" + "+sp" * options.get("sequence_parallel", False))
    if pp := options.get("pipeline_model_parallel_size"):
        virtual = "+vpp" * ("num_layers_per_virtual_pipeline_stage" in options)
        words.append(f"pp{pp}" + virtual + "+uneven" * ("num_layer_list" in options))
    words += ["distopt"] * options.get("use_distributed_optimizer", False)
    words += ["overlap"] * options.get("overlap_grad_reduce", False)
    if granularity := options.get("recompute_granularity"):
        words.append(f"{granularity} {options.get('recompute_method', '')}".strip())
    return ", ".join([*words, f"micro {options['micro_batch_size']}"])

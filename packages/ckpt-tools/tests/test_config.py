"""The architecture, and its spelling in config.json."""

import json
import math

import pytest
from ckpt_tools import CheckpointError, LlamaConfig, sharding
from models import hf_shapes, small
from transformers import LlamaConfig as TransformersConfig
from transformers import LlamaForCausalLM


def write(folder, stated):
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def test_both_spellings_of_transformers(tmp_path):
    stated = small(rotary_base=12345.0).to_hf("float16")
    assert LlamaConfig.from_hf(write(tmp_path, stated)) == small(rotary_base=12345.0)
    theta = stated.pop("rope_theta")
    newer = {**stated, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "dtype": "float16"}
    assert LlamaConfig.from_hf(write(tmp_path, newer) / "config.json") == small(rotary_base=12345.0)


def test_old_files_leave_out_what_has_a_default(tmp_path):
    stated = small(num_query_groups=4).to_hf("float16")
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias"):
        del stated[key]
    assert LlamaConfig.from_hf(write(tmp_path, stated)) == small(num_query_groups=4)


def test_transformers_defaults_are_ours(tmp_path):
    write(tmp_path, {"model_type": "llama", **dict.fromkeys(("hidden_size", "intermediate_size"), 32), "vocab_size": 8,
                     "num_hidden_layers": 1, "num_attention_heads": 2})  # fmt: skip
    ours, theirs = LlamaConfig.from_hf(tmp_path), TransformersConfig.from_pretrained(tmp_path)
    assert ours.layernorm_epsilon == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.num_query_groups == theirs.num_key_value_heads


def test_what_we_write_is_what_transformers_understands(tmp_path):
    config = small(rotary_base=5e5, layernorm_epsilon=3e-6, bos_token_id=None, kv_channels=6)
    theirs = TransformersConfig.from_pretrained(write(tmp_path, config.to_hf("bfloat16")))
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert (theirs.rms_norm_eps, theirs.head_dim, theirs.bos_token_id) == (3e-6, 6, None)
    assert str(theirs.dtype).endswith("bfloat16")
    shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(theirs).state_dict().items()}
    assert shapes == hf_shapes(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mistral"}, "only \"llama\""),
        ({"tie_word_embeddings": True}, "ties the head"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_hidden_layers": 100_000_000}, "num_layers is 100000000: it must be 16384 at most"),
        ({"max_position_embeddings": 10**18}, "max_position_embeddings is 10+: it must be 16777216 at most"),
        ({"rms_norm_eps": math.inf}, "layernorm_epsilon is inf: it must be finite"),
        ({"rms_norm_eps": None}, "layernorm_epsilon is None: it must be a number"),
        ({"rope_theta": math.inf}, "rotary_base is inf"),
        ({"rope_theta": 10**400}, "rotary_base is inf"),
        ({"rope_theta": "10000"}, "rotary_base is '10000': it must be a number"),
        ({"initializer_range": math.nan}, "init_method_std is nan"),
        ({"initializer_range": True}, "init_method_std is True"),
        ({"rope_scaling": "linear"}, "rope_scaling to 'linear': it must be an object"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"bos_token_id": 37}, r"bos_token_id is 37: it must be null, or .* \(0 to 36\)"),
        ({"eos_token_id": math.inf}, "eos_token_id is inf"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"eos_token_id": []}, "eos_token_id"),
    ],
)  # fmt: skip
def test_other_architectures_are_refused(tmp_path, change, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        LlamaConfig.from_hf(write(tmp_path, small().to_hf("float16") | change))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ({"pad_token_id": -1}, {}),
        ({"pad_token_id": None, "eos_token_id": [7, 36]}, {"eos_token_id": 7}),
        ({"bos_token_id": None, "eos_token_id": 0}, {"bos_token_id": None, "eos_token_id": 0}),
        ({"rope_theta": 500_000, "rms_norm_eps": 1}, {"rotary_base": 5e5, "layernorm_epsilon": 1.0}),
        ({"rope_scaling": None, "rope_parameters": {}}, {}),
        ({"max_position_embeddings": 10_485_760}, {"max_position_embeddings": 10_485_760}),
    ],
)
def test_what_real_files_state_is_kept(tmp_path, stated, kept):
    config = LlamaConfig.from_hf(write(tmp_path, small().to_hf("float16") | stated))
    assert config == small(**kept)
    assert type(config.rotary_base) is type(config.layernorm_epsilon) is float


def test_what_is_missing_is_named(tmp_path):
    stated = small().to_hf("float16")
    del stated["intermediate_size"], stated["vocab_size"]
    with pytest.raises(CheckpointError, match="does not state intermediate_size, vocab_size"):
        LlamaConfig.from_hf(write(tmp_path, stated))


def test_impossible_values_are_refused():
    with pytest.raises(ValueError, match="4 attention heads do not divide among 3"):
        small(num_query_groups=3)
    with pytest.raises(ValueError, match="hidden_size is -1"):
        small(hidden_size=-1)
    with pytest.raises(ValueError, match="layernorm_epsilon"):
        small(layernorm_epsilon=0.0)
    with pytest.raises(ValueError, match="kv_channels is 3"):
        small(kv_channels=3)
    with pytest.raises(ValueError, match="eos_token_id is 37"):
        small(eos_token_id=37)


def test_padding_follows_megatrons_rule():
    assert small(vocab_size=32000).padded_vocab_size(8, 128) == 32768
    assert small(vocab_size=32000).padded_vocab_size(1, 128) == 32000
    assert small(vocab_size=32001).padded_vocab_size(2) == 32002


def test_the_rules_name_every_parameter_once():
    config = small(num_layers=3)
    sizes = sum(_size(rule.shape) for rule in sharding(config).values())
    assert sizes == sum(_size(shape) for shape in hf_shapes(config).values())
    names = list(sharding(config))
    assert (names[0], names[-1]) == ("embedding.word_embeddings.weight", "output_layer.weight")


def _size(shape):
    return shape[0] * (*shape, 1)[1]

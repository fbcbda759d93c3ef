"""Loading and generating on one process need none of the engines, nor transformers."""

import subprocess
import sys

CODE = """
import sys
for name in ("megatron", "megatron.core", "transformers", "deepspeed", "torch_npu", "apex", "safetensors"):
    sys.modules[name] = None  # importing it fails
from llama_model import generate, load_model

model = load_model(sys.argv[1])
print([step.tokens[0] for step in generate(model, [[1, 5, 7]], max_new_tokens=5)])
"""


def test_generation_runs_with_every_engine_unimportable(gqa):
    command = [sys.executable, "-c", CODE, str(gqa.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from llama_model import generate, load_model

    steps = generate(load_model(gqa.folder), [[1, 5, 7]], max_new_tokens=5)
    assert done.stdout.strip() == str([step.tokens[0] for step in steps])


def test_importing_the_package_imports_no_torch():
    code = "import sys, llama_model, llama_model.cli; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

import pytest
from models import hf_state, small, write_hf


@pytest.fixture
def model(tmp_path):
    """A small Hugging Face folder of random bits."""
    config = small()
    return write_hf(tmp_path / "hf", config, hf_state(config))

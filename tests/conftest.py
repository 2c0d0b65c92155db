"""Common fixtures: offline, seeded, two threads (a worker has one), unwritten memory filled with NaN, tiny configs."""

import atexit
import os
import shutil
import tempfile

# these are read when transformers and huggingface_hub are imported, so they come before any import of ours
if "HF_ENDPOINT" not in os.environ:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
if (
    "HF_HOME" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ
):  # workers share no cache: they would write the same modules at once
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="flashlite-test-", dir=os.environ.get("HF_HOME"))
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # one for each core: threads of busy workers would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

# a machine that does other things, too, is no fault of a test
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "block_size": 8,
    "sub_block_size": 4,
    "relevance_top_k": 2,
    "memory_blocks": 8,
    "dropout_rate": 0.0,
}


@pytest.fixture(autouse=True)
def reproducible():
    """Same seed for every test; reading memory that was never written gives NaN instead of luck."""
    from transformers import set_seed

    set_seed(0)
    # PyTorch's own switch: with it, torch.empty and its kin hand out NaN (integers: the largest value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def rare_digits_of_small_weights():
    """Lists of rare digits, which pay for large weights only, are held for the small ones of tests, too."""
    from modeling_flashlite import ecq_weight_flashlite

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ecq_weight_flashlite, "_LEAST_SAVED", 1)
        yield


@pytest.fixture
def tiny_config():
    """Factory of two-layer, 32-wide configs: ``tiny_config(is_encoder_decoder=True, vocab_size=50)``."""

    def make(**overrides):
        from modeling_flashlite import FlashLiteConfig

        return FlashLiteConfig(**{**TINY, "is_encoder_decoder": False, **overrides})

    return make


@pytest.fixture
def causal_config(tiny_config):
    """Decoder-only tiny config."""
    return tiny_config()


@pytest.fixture
def seq2seq_config(tiny_config):
    """Encoder-decoder tiny config."""
    return tiny_config(is_encoder_decoder=True)


@pytest.fixture
def make(tiny_config):
    """Factory of small random heads in evaluation mode: ``make(FlashLiteForCausalLM, encoder=False, **config)``."""

    def build(model_class, encoder, **overrides):
        config = tiny_config(is_encoder_decoder=encoder, **overrides)
        # wide initial weights: a tiny random model of the usual scale tells no path from another
        config.initializer_range = 0.2
        return model_class(config).eval()

    return build

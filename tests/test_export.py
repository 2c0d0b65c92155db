"""ONNX export: encoder, decoder with cache and generation agree with the model; refusals give a reason."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import HEADS, make_model, save_checkpoint

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name, reason=f"the export extra is not installed: {name}")

from transformers import AutoConfig, AutoTokenizer, GenerationConfig  # noqa: E402

from modeling_flashlite.checkpoint import load_language_model  # noqa: E402
from modeling_flashlite.publish import onnx_export  # noqa: E402
from modeling_flashlite.publish.onnx_export import (  # noqa: E402
    ExportError,
    OnnxGenerator,
    export_onnx,
    measure_parity,
    quantize_weights,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["causal", "quantized"])
def exported(request, tmp_path_factory):
    """The script's own work on a saved checkpoint: folder of the checkpoint and of the graphs."""
    base = tmp_path_factory.mktemp(request.param)
    save_checkpoint(request.param, base / "run")
    spec = importlib.util.spec_from_file_location("export", ROOT / "scripts" / "export.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = ["--model", str(base / "run"), "--output", str(base / "onnx"), "--max-length", "56"]
    assert script.main(arguments) == 0
    model = load_language_model(str(base / "run"), device="cpu")
    return model.dequantize() if request.param == "quantized" else model, base / "onnx"


@pytest.mark.slow
def test_tokenizer_config_and_generation_settings_stand_beside_the_graph(exported):
    model, folder = exported
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert len(tokenizer) == config.vocab_size == model.config.vocab_size
    assert str(ROOT).encode() not in (folder / "decoder.onnx").read_bytes(), "the graph names paths of this machine"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == model.generation_config.eos_token_id


@pytest.mark.slow
def test_weights_of_8_bits_are_smaller_and_near(exported, tmp_path):
    model, folder = exported
    rounded = shutil.copytree(folder, tmp_path / "int8")
    graphs = sorted(rounded.glob("*.onnx"))
    for path in graphs:
        quantize_weights(path)
        assert path.stat().st_size < 0.9 * (folder / path.name).stat().st_size
    parity = measure_parity(model, rounded, steps=4)
    assert 0 < parity.pop("prompt") < 0.1 and max(value for name, value in parity.items() if name != "generate") < 0.1
    with pytest.raises(ExportError, match="no matrix product"):
        quantize_weights(graphs[0])


@pytest.mark.slow
def test_graphs_agree_with_the_model_beyond_the_dense_range(exported):
    """Blocks of 8 and two relevant ones: from token 32 on, attention is sparse; the cache holds 56."""
    model, folder = exported
    for seed in (1, 2):
        parity = measure_parity(model, folder, steps=8, seed=seed)
        assert parity.pop("generate") == 1.0
        assert max(parity.values()) < 1e-4, parity


@pytest.mark.slow
def test_batch_and_padding_change_nothing(exported):
    _, folder = exported
    runner, random = OnnxGenerator(folder), np.random.default_rng(0)
    rows = [random.integers(8, 300, size) for size in (5, 11, 20)]
    ids, mask = np.zeros((3, 20), np.int64), np.zeros((3, 20), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    runner.config["eos_token_id"] = []
    together = runner.generate(ids, mask, max_new_tokens=6)
    for index, row in enumerate(rows):
        assert (runner.generate(row[None], max_new_tokens=6)[0] == together[index]).all()
    with pytest.raises(ValueError, match="need more than the 56 slots"):
        runner.generate(ids, mask, max_new_tokens=60)


@pytest.mark.parametrize(
    ("kind", "length", "message"),
    [
        ("classifier", 64, "FlashLiteForSequenceClassification has no export"),
        ("causal", 60, "multiple of block_size = 8"),
        ("causal", 0, "multiple of block_size = 8"),
    ],
)
def test_what_cannot_be_exported_says_why(kind, length, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_onnx(make_model(kind), tmp_path, length)


def test_quantized_and_stretched_models_are_refused(tmp_path):
    model = HEADS["seq2seq"][0].from_pretrained(save_checkpoint("quantized", tmp_path / "run"))
    with pytest.raises(ExportError, match=r"call model.dequantize\(\) first"):
        export_onnx(model, tmp_path)
    model = make_model("causal")
    model.model.decoder.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ExportError, match="depends on the length"):
        export_onnx(model, tmp_path)


@pytest.mark.parametrize("position_encoding", ["rotary", "transformer_xl"])
def test_decoder_graph_is_the_model_for_every_position_encoding(position_encoding):
    """In PyTorch, without the exporter: the graph's forward against the model's, over a cache that was written to."""
    from modeling_flashlite import FlashLiteConfig, FlashLiteForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    axes = {"block_size": 4, "sub_block_size": 2, "relevance_top_k": 1, "memory_blocks": 6}
    config = FlashLiteConfig(
        vocab_size=50, **sizes, **axes, position_encoding=position_encoding, is_encoder_decoder=False
    )
    model = FlashLiteForCausalLM(config).double().eval()
    ids = torch.randint(3, 50, (2, 39))
    graph = onnx_export.DecoderGraph(model)
    keys, values = (torch.zeros(shape).double() for shape in onnx_export.cache_shapes(model, 40, 2))
    with torch.no_grad():
        first, keys, values = graph(ids[:, :30], torch.zeros(2, dtype=torch.long), keys, values)
        second, _, _ = graph(ids[:, 30:], torch.full((2,), 30), keys, values)
        torch.testing.assert_close(torch.cat([first, second], 1), model(ids).logits, rtol=0, atol=1e-9)

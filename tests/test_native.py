"""The compiled path: its products and layers against float32 references, at every level of processor."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from verbs import load_script

from modeling_flashlite import FlashLiteConfig, FlashLiteForCausalLM, enable_native
from modeling_flashlite.checkpoint import load_language_model, read_tokenizer
from modeling_flashlite.decode_flashlite import TokenStep, decode_session
from modeling_flashlite.ecq_layers_flashlite import enter_codes
from modeling_flashlite.ecq_modules_flashlite import EcqLinear, EcqModule, to_float, to_quantized
from modeling_flashlite.ecq_weight_flashlite import QuantizedWeight, TiledWeight
from modeling_flashlite.int4_flashlite import KernelWeight, int4_few_rows, spread
from modeling_flashlite.layer_step_flashlite import LayerStep
from modeling_flashlite.native import kernels
from modeling_flashlite.serve.continuous import join_caches
from modeling_flashlite.tiles_flashlite import untile_codes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def native():
    """The library, built once and kept in the user's cache."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None or not kernels.cpp_extension.is_ninja_available() or kernels.fcntl is None:
        pytest.skip(f"there is no {compiler}, no ninja or no fcntl on this machine")
    kernels.build()
    return torch.ops.flashlite_native


@pytest.fixture
def enabled(native):
    if not native.best_level():
        pytest.skip("the processor has neither AVX2 nor AVX-512")
    enable_native()
    yield native
    enable_native(False)


def random_weight(rows: int, columns: int, wide: int, seed: int, rare: int = 0) -> TiledWeight:
    """Codes of which the first `wide` columns have two or three digits, as `rare` others; `wide` adds scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int16)
    for column in range(min(wide, columns)):
        reach = (136, 2184)[column % 2]
        codes[:, column] = torch.randint(-reach, reach * 7 // 8, (rows,), generator=generator, dtype=torch.int16)
    for _ in range(rare):
        row, column = (int(torch.randint(size, (), generator=generator)) for size in (rows, columns))
        codes[row, column] = int(torch.randint(-2184, 1912, (), generator=generator))
    exponents = torch.randint(-30, 30, (rows,), generator=generator).to(torch.int8)
    # the same for all layers of one width, which can be joined then
    generator.manual_seed(columns)
    scales = torch.randint(-16, 16, (columns,), generator=generator).to(torch.int8) if wide else None
    return TiledWeight.of(QuantizedWeight(codes, 0.02, exponents, column_exponents=scales))


def held(weight: TiledWeight, bias: torch.Tensor | None = None):
    """A weight as the compiled code takes it."""
    tensors = weight.tiles, weight.step(), weight.shape[1], *weight.inputs(), weight.rare
    return kernels.NativeWeight.of(*tensors, bias).held


@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 200),
    wide=st.integers(0, 5),
    rare=st.integers(0, 30),
    count=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    level=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@example(rows=58, columns=2, wide=2, rare=0, count=2, dtype=torch.float32, level=0, seed=70)
@settings(max_examples=100, deadline=None)
def test_products_of_any_shape(native, rows, columns, wide, rare, count, dtype, level, seed):
    """Activations have 15 bits, so float32 results are those of float32 products; 8 bits in more than four rows."""
    weight = random_weight(rows, columns, wide, seed, rare)
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = torch.randn(rows) if seed % 2 else None
    matrix = weight.quantized().dequantize().double()
    expected = F.linear(x.double(), matrix, None if bias is None else bias.double())
    native.use_level(level)
    try:
        value = held(weight, bias).rows(x)
    finally:
        native.use_level(2)
    assert value.dtype == dtype and value.shape == expected.shape
    # 32 activations share a scale, in which digits of wide columns count 16 or 256 times: half a unit of each is lost
    digits = untile_codes(weight.tiles, rows, weight.tiles.shape[1]).double().abs()
    inputs = spread(x.float(), *weight.inputs()).double().abs()
    inputs = F.pad(inputs, (0, digits.shape[1] - inputs.shape[1]))
    peaks, sums = inputs.unflatten(1, (-1, 32)).amax(2), digits.unflatten(1, (-1, 32)).sum(2)
    units = 127 * 508 if count <= 4 else 127 * 2
    rounded, summed = peaks @ sums.T / units, 2e-6 * inputs @ (digits + 16).T
    summed += (
        2e-6 * inputs[:, :columns] @ (weight.codes() - untile_codes(weight.tiles, rows, columns)).double().abs().T
    )
    limit = 1.01 * (rounded + summed) * weight.step().double() + 1e-6
    rounding = 0 if dtype == torch.float32 else 2**-8
    assert ((value - expected).abs() <= limit + rounding * expected.abs()).all()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_what_is_not_finite_stays_so(native, level):
    weight = random_weight(70, 64, 2, 0)
    x = torch.randn(3, 64)
    x[0, 5], x[1, 40] = float("nan"), float("inf")
    native.use_level(level)
    value = held(weight).rows(x)
    native.use_level(2)
    assert not value[:2].isfinite().any() and value[2].isfinite().all()


def test_damaged_weights_are_refused(native):
    weight, make = random_weight(70, 64, 2, 0, rare=9), torch.classes.flashlite_native.Held
    parts = tiles, step, numbers, factors, starts, entries = [
        *(weight.tiles, weight.step(), *weight.inputs()),
        *weight.rare.padded(128).by_tiles(),
    ]
    x = torch.randn(1, 64)
    assert torch.equal(make(parts, None, 64).rows(x), held(weight).rows(x))
    for damaged in (
        (tiles, step, numbers + 64, factors),
        (tiles, step, numbers, None),
        (tiles, step, numbers, factors[:-1]),
        (tiles[:1], step, numbers, factors),
        (tiles[..., :16], step, numbers, factors),
        (tiles, step, numbers, factors, starts[:-1]),
        (tiles, step, numbers, factors, starts + 9),
        (tiles, step, numbers, factors, starts.flip(0)),
        (tiles, step, numbers, factors, starts, entries + 64 * 64),
        (tiles, step, numbers, factors, starts, -entries - 1),
        (tiles, step, numbers, factors, starts, entries[:-1]),
        (tiles, step, numbers, factors, None),
    ):
        with pytest.raises(RuntimeError, match="must|do not fit"):
            make([*damaged, *parts[len(damaged) :]], None, 64)
    with pytest.raises(RuntimeError, match="do not fit"):
        make(parts, None, 500)
    with pytest.raises(RuntimeError, match="six parts"):
        make(parts[:2], None, 64)
    with pytest.raises(RuntimeError, match="must be"):
        make(parts, None, 64).rows(torch.randn(1, 65))


def test_enabled_and_disabled_again(enabled):
    """Layers prepare their products by the compiled code."""
    weight, x = random_weight(100, 64, 3, 1, rare=20), torch.randn(2, 64)
    inputs = weight.tiles, weight.step(), 64, *weight.inputs(), weight.rare
    native, expected = KernelWeight.of(*inputs), F.linear(x, weight.quantized().dequantize())
    assert (int4_few_rows(x, native, 100) - expected).norm() < 1e-4 * expected.norm()
    enable_native(False)
    python = KernelWeight.of(*inputs)
    assert type(python) is KernelWeight
    assert (int4_few_rows(x, python, 100) - expected).norm() < 1e-2 * expected.norm()


def test_without_a_compiler_one_sentence_says_so(monkeypatch):
    def missing():
        raise RuntimeError("Ninja is required")

    monkeypatch.setattr(kernels.cpp_extension, "verify_ninja_availability", missing)
    with pytest.raises(RuntimeError, match=r"could not be built \(Ninja is required\); install .*flashlite\[native\]"):
        kernels.build.__wrapped__()


def coded_and_float(config: FlashLiteConfig, wide: int, seed: int):
    """A model whose layers (and table, for odd seeds) have random codes, and the same with float32 weights."""
    torch.manual_seed(seed)
    coded = FlashLiteForCausalLM(config).eval()
    if seed % 2:
        table, head = (to_quantized(part) for part in (coded.get_input_embeddings(), coded.lm_head))
        weight = random_weight(*table.weight_shape, wide, seed, rare=20)
        weight.base *= 0.2 / weight.quantized().dequantize().std().item()
        enter_codes(table, [table, head], weight)
    for name, module in coded.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("_proj") and "r_proj" not in name:
            if module.bias is not None:
                nn.init.normal_(module.bias)
            weight = random_weight(*module.weight.shape, wide, seed, rare=20 * (seed % 2))
            weight.base *= 0.6 / weight.quantized().dequantize().norm(dim=1).mean().item()
            to_quantized(module).set_quantized(weight)
        elif isinstance(module, nn.RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    plain = copy.deepcopy(coded)
    for module in plain.modules():
        if isinstance(module, EcqModule):
            to_float(module, torch.float32)
    return coded, plain


@torch.inference_mode()
def logits_by_token(model, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of the tokens after a prompt, one token at a time in a session."""
    with decode_session(model):
        cache = model(ids[:, :prompt]).past_key_values
        steps = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(prompt, ids.shape[1])]
    return torch.cat(steps, 1).float()


@torch.inference_mode()
def step_aside(model, ids: torch.Tensor, draw: int) -> torch.Tensor:
    """Logits after each weight has moved by some 2e-5 of itself: what no arithmetic of 15 bits can tell apart."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(draw)
    for value in moved.parameters():
        value.mul_(1 + 2e-5 * torch.randn(value.shape, generator=generator))
    return moved(ids).logits


@given(
    heads=st.sampled_from([(4, 4, 8), (4, 2, 16), (6, 2, 10), (3, 1, 6)]),
    blocks=st.sampled_from([(8, 4, 2, None), (4, 1, 3, 9), (8, 8, 0, 20), (4, 2, None, 5), (16, 4, None, None)]),
    position=st.sampled_from(["rotary", "transformer_xl"]),
    norms=st.sampled_from([("pre", None), ("post", None), ("both", "head"), ("pre", "projection")]),
    bias=st.booleans(),
    wide=st.sampled_from([0, 3]),
    batch=st.integers(1, 3),
    inner=st.sampled_from([24, 70]),
    level=st.integers(0, 2),
    seed=st.integers(0, 9),
)
@example(
    heads=(4, 4, 8),
    blocks=(8, 4, 2, None),
    position="transformer_xl",
    norms=("post", None),
    bias=True,
    wide=0,
    batch=2,
    inner=70,
    level=0,
    seed=0,
)
@example(
    heads=(3, 1, 6),
    blocks=(8, 4, 2, None),
    position="rotary",
    norms=("post", None),
    bias=False,
    wide=3,
    batch=1,
    inner=70,
    level=0,
    seed=0,
)
@settings(max_examples=25, deadline=None)
def test_layers_of_any_shape(native, heads, blocks, position, norms, bias, wide, batch, inner, level, seed):
    """Logits are those of float32 weights in a full forward pass, through dense, sparse and bounded texts."""
    names = "block_size", "sub_block_size", "relevance_top_k", "memory_blocks"
    sizes = dict(zip(names, blocks))
    sizes |= dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads), intermediate_size=inner)
    kinds = {"position_encoding": position, "norm_placement": norms[0], "qk_norm": norms[1], "attention_bias": bias}
    config = FlashLiteConfig(**{**TINY, **sizes, **kinds}, is_encoder_decoder=False, initializer_range=0.2)
    coded, plain = coded_and_float(config, wide, seed)
    ids = torch.randint(3, 97, (batch, 70))
    with torch.inference_mode():
        expected = plain(ids).logits[:, 1:]
    native.use_level(level)
    enable_native()
    try:
        value = logits_by_token(coded, ids, 1)  # never more than four rows
    finally:
        enable_native(False)
        native.use_level(2)
    error, limit = (value - expected).abs().amax(-1), 2e-3 * expected.abs().max()
    if error.max() >= limit:  # a near tie of two blocks, or a norm of almost nothing: the float model moves as far
        limit = limit + torch.stack(
            [(step_aside(plain, ids, draw)[:, 1:] - expected).abs().amax(-1) for draw in range(8)]
        ).amax(0)
    assert (error < limit).all()


@pytest.mark.parametrize("encoding", ["rotary", "transformer_xl"])
def test_bfloat16_is_no_worse_than_the_python_path(enabled, tiny_config, encoding):
    config = tiny_config(position_encoding=encoding, initializer_range=0.2)
    coded, plain = coded_and_float(config, 3, 0)
    ids = torch.randint(3, 97, (2, 70))
    with torch.inference_mode():
        expected = plain(ids).logits[:, 3:]
    coded = coded.bfloat16()
    errors = {}
    for on in (True, False):
        enable_native(on)
        for module in coded.modules():
            if isinstance(module, EcqLinear):
                module._forget()
        errors[on] = (logits_by_token(coded, ids, 3) - expected).norm() / expected.norm()
    assert errors[True] < errors[False] < 0.1


@pytest.mark.parametrize(("part", "seed"), [(LayerStep, 0), (TokenStep, 1)])
def test_the_whole_layer_or_decoder_runs_compiled(enabled, tiny_config, monkeypatch, part, seed):
    """No token takes the Python path, before and after the first block leaves the dense range."""
    coded, _ = coded_and_float(tiny_config(memory_blocks=None), 0, seed)
    monkeypatch.setattr(part, "__call__", lambda *_: pytest.fail("the Python path ran"))
    logits_by_token(coded, torch.randint(3, 97, (1, 60)), 3)


def test_other_activations_take_the_python_path(enabled, tiny_config):
    ids = torch.randint(3, 97, (2, 20))
    coded, plain = coded_and_float(tiny_config(hidden_act="gelu"), 0, 0)
    with torch.inference_mode():
        expected = plain(ids).logits[:, 2:]
    assert (logits_by_token(coded, ids, 2) - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize(("count", "limit"), [(3, 1e-3), (9, 3e-2)])
@pytest.mark.parametrize("memory_blocks", [None, 3])
@pytest.mark.parametrize("encoding", ["rotary", "transformer_xl"])
def test_rows_of_different_lengths(enabled, tiny_config, monkeypatch, count, limit, memory_blocks, encoding):
    """Rows that join a batch at different lengths get the logits that they get alone, through blocks that close."""
    # blocks of nearly equal shares may change places when activations are bytes
    chosen = {} if count <= 4 else {"relevance_top_k": None}
    config = tiny_config(memory_blocks=memory_blocks, position_encoding=encoding, **chosen)
    coded, plain = coded_and_float(config, 2, int(count > 4))  # without and with codes in the table
    texts = [torch.randint(3, 97, (1, 40)) for _ in range(count)]
    starts = [1 + 2 * index for index in range(count)]
    with torch.inference_mode():
        expected = [plain(ids).logits[0, at : at + 18] for ids, at in zip(texts, starts)]
        caches = [coded(ids[:, :at]).past_key_values for ids, at in zip(texts, starts)]
        for other in caches[1:]:
            join_caches(caches[0], other)
        monkeypatch.setattr(LayerStep, "__call__", lambda *_: pytest.fail("the Python path ran"))
        mask = pad_sequence([torch.ones(at, dtype=torch.long) for at in starts], True, padding_side="left")
        value = []
        with decode_session(coded):
            for step in range(18):
                mask = torch.cat([mask, mask.new_ones(count, 1)], 1)
                new = torch.cat([ids[:, at + step : at + step + 1] for ids, at in zip(texts, starts)])
                cache = {"past_key_values": caches[0], "attention_mask": mask}
                value.append(coded(new, position_ids=mask.sum(1, keepdim=True) - 1, **cache).logits[:, 0])
    error = torch.stack(value, 1) - torch.stack(expected)
    assert error.norm() < limit * torch.stack(expected).norm()


def test_prompts_are_of_the_precision_of_the_python_path(enabled, tiny_config):
    """A whole text at once, whose activations are bytes, is about as exact as in bfloat16."""
    coded, plain = coded_and_float(tiny_config(), 3, 0)
    ids, errors = torch.randint(3, 97, (2, 70)), {}
    with torch.inference_mode():
        expected = plain(ids).logits
        for on in (True, False):
            enable_native(on)
            for module in coded.modules():
                if isinstance(module, EcqLinear):
                    module._forget()
            errors[on] = (coded(ids).logits - expected).norm() / expected.norm()
    assert errors[True] < 2 * errors[False] < 0.1


@pytest.mark.parametrize("name", ["flash-lite-lm", "flash-lite-en-de"])
def test_committed_models_generate_the_same(enabled, name):
    """Greedy tokens of the Python path, with and without an encoder."""
    folder, tokens = str(ROOT / "model_cards" / name), {}
    text = "The history of the city begins in the year"
    for on in (False, True):
        enable_native(on)
        model = load_language_model(folder)
        inputs = read_tokenizer(folder)(text, return_tensors="pt", return_token_type_ids=False)
        tokens[on] = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert tokens[True].tolist() == tokens[False].tolist()


def test_a_killed_build_does_not_block_the_next(tmp_path):
    (tmp_path / "lock").touch()
    with kernels._alone(tmp_path):
        assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("name", ["chat", "serve"])
def test_scripts_say_that_there_is_no_compiler(name, monkeypatch, capsys):
    def missing():
        raise RuntimeError("Ninja is required")

    monkeypatch.setattr(kernels, "build", missing)
    assert load_script(name).main(["--model", str(ROOT / "model_cards" / "flash-lite-lm"), "--native"]) == 2
    assert capsys.readouterr().err == f"{name}: Ninja is required\n"

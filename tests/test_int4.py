"""Packed int4 products and look-ups against their references: values, gradients, every dtype, awkward shapes."""

import contextlib
import copy
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_flashlite import int4_flashlite as int4
from modeling_flashlite import tiles_flashlite
from modeling_flashlite.ecq_weight_flashlite import QuantizedWeight, TiledWeight
from modeling_flashlite.int4_flashlite import (
    KernelWeight,
    int4_embedding,
    int4_embedding_reference,
    int4_few_rows,
    int4_linear,
    int4_linear_reference,
)
from modeling_flashlite.int8_flashlite import int8_codes, int8_matmul
from modeling_flashlite.tiles_flashlite import dequantize_int4, tile_codes, untile_codes

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(64, 32), (512, 172), (172, 64), (1, 1), (33, 7), (100, 300)]


def make(out_features, in_features, seed=0):
    """(codes [N, K], tiles, step [N])"""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)
    step = torch.rand(out_features, generator=generator) * 0.02 + 0.01
    return codes, tile_codes(codes), step


def relative_error(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)).item()


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_tiles_hold_the_codes(out_features, in_features, seed):
    codes, tiles, step = make(out_features, in_features, seed)
    assert tiles.shape[::2] == (-(-out_features // 64), 32)
    assert in_features <= tiles.shape[1] < in_features + 64 and tiles.shape[1] % 32 == 0
    assert torch.equal(untile_codes(tiles, out_features, in_features), codes)
    assert torch.equal(dequantize_int4(tiles, step, in_features), codes * step[:, None])


@pytest.mark.parametrize("codes", [torch.full((4, 4), 8), torch.full((4, 4), -9), torch.zeros(4, 4)], ids=str)
def test_tiles_take_int4_codes_only(codes):
    with pytest.raises(ValueError, match=r"int8 codes -8\.\.7"):
        tile_codes(codes if codes.is_floating_point() else codes.to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_values(shape, dtype):
    """Every branch (kernel, int8, unpacked; bias or none) stays within its precision of the float32 reference."""
    _, tiles, step = make(*shape)
    bias = torch.randn(shape[0]).mul(0.01).to(dtype)
    for rows in (0, 1, 3, int4._KERNEL_ROWS + 1, int4._KERNEL_ROWS_EXACT + 5):
        x = torch.randn(rows, shape[1]).to(dtype)
        reference = int4_linear_reference(x.float(), tiles, step, shape[1])
        with torch.no_grad():
            exact = int4_linear(x, tiles, step, shape[1], int8_activations=False)
            mixed = int4_linear(x, tiles, step, shape[1])
            biased = int4_linear(x, tiles, step, shape[1], bias)
        assert exact.dtype == mixed.dtype == dtype and exact.shape == (rows, shape[0])
        assert relative_error(exact, reference) < 6e-3
        assert relative_error(mixed, reference) < 2e-2
        assert relative_error(biased, reference + bias) < 3e-2


@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.lists(st.integers(1, 5), max_size=2),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_linear_of_any_shape(out_features, in_features, batch, int8, seed):
    _, tiles, step = make(out_features, in_features, seed)
    x = torch.randn(*batch, in_features, generator=torch.Generator().manual_seed(seed))
    value = int4_linear(x, tiles, step, in_features, int8_activations=int8)
    reference = int4_linear_reference(x, tiles, step, in_features)
    assert value.shape == reference.shape
    scale = x.norm(dim=-1, keepdim=True) * step * 8 * 0.02
    assert ((value - reference).abs() <= scale + 1e-6).all()


@pytest.mark.parametrize("rows", [2, 50])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_gradients(shape, rows):
    """Gradients in x, step and bias, to bfloat16 precision."""
    codes, tiles, step = make(*shape)
    x, bias, step = torch.randn(rows, shape[1]).requires_grad_(), torch.randn(shape[0]).requires_grad_(), step
    step.requires_grad_()
    weight = torch.randn(rows, shape[0])
    reference = F.linear(x, codes.float() * step[:, None], bias)
    expected = torch.autograd.grad((reference * weight).sum(), (x, step, bias))
    value = int4_linear(x, tiles, step, shape[1], bias)
    actual = torch.autograd.grad((value * weight).sum(), (x, step, bias))
    for a, e in zip(actual, expected):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert relative_error(a, e) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_rows_in_one_call(shape, dtype):
    """The kernel that applies the steps keeps bfloat16 precision."""
    _, tiles, step = make(*shape)
    weight = KernelWeight.of(tiles, step, shape[1])
    for batch in [(1,), (2, 3), (32,)]:
        x = torch.randn(*batch, shape[1]).to(dtype)
        value = int4_few_rows(x, weight, shape[0])
        assert value.dtype == dtype and value.shape == (*batch, shape[0]) and value.is_contiguous()
        assert relative_error(value, int4_linear_reference(x.float(), tiles, step, shape[1])) < 6e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_held_int8_weights(shape, dtype):
    """Held, followed after a change, let go of; values to the precision of int8 activations, x left as it was."""
    _, tiles, step = make(*shape)
    bias = torch.randn(shape[0]).mul(0.01).to(dtype)
    with torch.no_grad(), int8_codes() as held:
        for seed in (0, 1):
            tiles.copy_(make(*shape, seed=seed)[1])
            for rows in (17, 70):
                x = torch.randn(rows, shape[1]).to(dtype)
                before = x.clone()
                value = int4_linear(x, tiles, step, shape[1], bias)
                reference = int4_linear_reference(before.float(), tiles, step, shape[1]) + bias
                assert value.dtype == dtype and torch.equal(x, before)
                assert relative_error(value, reference) < 3e-2
        assert int4_linear(x[:6], tiles, step, shape[1]).shape == (6, shape[0])
        capable = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        assert len(held) == capable
        del tiles
        assert len(held) == 0


def test_held_int8_weights_leave_outliers_and_gradients_alone():
    _, tiles, step = make(64, 256)
    x = torch.randn(100, 256)
    x[:, 0] = 300.0
    with int8_codes():
        assert relative_error(int4_linear(x, tiles, step, 256), int4_linear_reference(x, tiles, step, 256)) < 6e-3
        x[3, 1] = float("nan")
        assert not int4_linear(x, tiles, step, 256)[3].isfinite().any()
        x = torch.randn(40, 256, requires_grad=True)
        step.requires_grad_()
        for gradient in torch.autograd.grad(int4_linear(x, tiles, step, 256).sum(), (x, step)):
            assert gradient.any()
        (gradient,) = torch.autograd.grad(int4_linear(x.detach(), tiles, step, 256).sum(), step)
        assert gradient.any()
    with torch.inference_mode():  # tensors without a version
        tiles = make(64, 256)[1]
        with int8_codes():
            assert int4_linear(x.detach(), tiles, step, 256).shape == (40, 64)


def test_several_groups_equal_one(monkeypatch):
    """Unpacking a few tiles at a time changes nothing."""
    _, tiles, step = make(300, 96)
    x, grad = torch.randn(60, 96, dtype=torch.bfloat16), torch.randn(60, 300)
    run = lambda: (  # noqa: E731
        int4_linear(x, tiles, step, 96),
        int4_linear(x, tiles, step, 96, int8_activations=False),
        int4.int4_matmul_backward(grad, tiles, 96),
    )
    whole = run()
    monkeypatch.setattr(tiles_flashlite, "_GROUP_WEIGHTS", 5000)
    for a, b in zip(run(), whole):
        assert relative_error(a, b) < 4e-3
    for shape in [(300, 96), (129, 33), (128, 31)]:
        codes, tiles, step = make(*shape)
        assert torch.equal(untile_codes(tiles, *shape), codes)
        assert torch.equal(dequantize_int4(tiles, step, shape[1]), codes * step[:, None])


def test_outliers_are_not_rounded_to_int8():
    """One huge activation would drown the others in an int8 scale; such rows are computed exactly."""
    _, tiles, step = make(64, 256)
    x = torch.randn(100, 256)
    x[:, 0] = 300.0
    with torch.no_grad():
        assert int8_matmul(x.bfloat16(), tiles) is None
        value = int4_linear(x, tiles, step, 256)
    assert relative_error(value, int4_linear_reference(x, tiles, step, 256)) < 6e-3


@given(st.integers(1, 90), st.integers(2, 150), st.sampled_from([7, 100, 127, 1900]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_codes_of_several_digits(out_features, in_features, largest, seed):
    """Every way of multiplying by wide columns with scales, held as int8 or not, with outliers or not."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-7, 8, (out_features, in_features), generator=generator, dtype=torch.int16)
    codes[:, ::3] = torch.randint(-largest, largest, codes[:, ::3].shape, generator=generator, dtype=torch.int16)
    codes[0, 1] = largest  # a rare digit in more than 24 rows
    exponents, scales = (torch.randint(-9, 9, (n,), generator=generator).to(torch.int8) for n in codes.shape)
    weight = QuantizedWeight(codes, 0.01, exponents, 16, scales)
    tiled, dense = TiledWeight.of(weight), weight.dequantize()
    numbers, factors = tiled.inputs()
    for rows in (2, 6, 20):
        x = torch.randn(rows, in_features, generator=generator)
        x[:, 0] *= 100
        for region in (contextlib.nullcontext(), int8_codes()):
            with torch.no_grad(), region:
                digits = {"numbers": numbers, "factors": factors, "rare": tiled.rare}
                value = int4_linear(x, tiled.tiles, tiled.step(), in_features, **digits)
            error = (value - x @ dense.T).norm()
            assert error <= 3e-2 * x.norm() * dense.norm() / in_features**0.5


@pytest.mark.parametrize("rows", [2, 50])
def test_not_finite_stays_not_finite(rows):
    _, tiles, step = make(64, 32)
    x = torch.randn(rows, 32)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    value = int4_linear(x, tiles, step, 32)
    assert not value[:2].isfinite().any()
    assert value[2:].isfinite().all()
    assert torch.equal(int4_linear(torch.zeros(rows, 32), tiles, step, 32), torch.zeros(rows, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embedding_is_exact(shape, dtype):
    _, tiles, step = make(*shape)
    ids = torch.randint(0, shape[0], (3, 5))
    value = int4_embedding(ids, tiles, step, shape[1], dtype)
    assert torch.equal(value, int4_embedding_reference(ids, tiles, step, shape[1], dtype))
    assert int4_embedding(ids[:0], tiles, step, shape[1], dtype).shape == (0, 5, shape[1])
    with pytest.raises(IndexError):
        int4_embedding(torch.tensor([shape[0]]), tiles, step, shape[1])


def test_embedding_gradient_in_step():
    codes, tiles, step = make(40, 24)
    ids = torch.randint(0, 40, (17,))
    step.requires_grad_()
    (actual,) = torch.autograd.grad(int4_embedding(ids, tiles, step, 24).square().sum(), step)
    (expected,) = torch.autograd.grad(F.embedding(ids, codes * step[:, None]).square().sum(), step)
    torch.testing.assert_close(actual, expected)


def test_one_storage_serves_embedding_and_head():
    """The tied case: rows looked up and logits computed from the same tiles."""
    codes, tiles, step = make(200, 48)
    hidden = int4_embedding(torch.arange(200), tiles, step, 48)
    logits = int4_linear(hidden, tiles, step, 48)
    weight = codes * step[:, None]
    assert relative_error(logits, weight @ weight.T) < 2e-2


def test_meta_tensors_run():
    """Shapes can be traced before any weight exists."""
    _, tiles, step = make(64, 40)
    value = int4_linear(torch.empty(3, 40, device="meta"), tiles.to("meta"), step.to("meta"), 40)
    assert value.shape == (3, 64)


def test_nothing_made_elsewhere_is_kept():
    """Scales and probes are cached, so neither a default device nor fake tensors may decide what they are."""
    _, tiles, step = make(64, 32)
    x = torch.randn(2, 32)
    expected = int4_linear(x, tiles, step, 32)
    int4._unit_scales.cache_clear()
    int4._tiles_fit_kernel.cache_clear()
    with torch.device("meta"):
        assert torch.equal(int4_linear(x, tiles, step, 32), expected)
    int4._unit_scales.cache_clear()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (x, tiles, step)]
        assert int4_linear(*fakes, 32).shape == (2, 64)
    assert torch.equal(int4_linear(x, tiles, step, 32), expected)


def test_wrong_width_is_named():
    _, tiles, step = make(64, 64)
    with pytest.raises(ValueError, match="in_features is 64"):
        int4_linear(torch.randn(2, 63), tiles, step, 64)


@pytest.mark.parametrize("rows", [1, 50])
def test_compiles_with_and_without_gradient(rows):
    _, tiles, step = make(96, 40)
    bias = torch.randn(96)
    compiled = torch.compile(
        lambda x: int4_linear(x, tiles, step, 40, bias).relu(), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(rows, 40)
    with torch.no_grad():
        assert relative_error(compiled(x), int4_linear(x, tiles, step, 40, bias).relu()) < 4e-3
    x.requires_grad_()
    value = compiled(x)
    expected = int4_linear(x, tiles, step, 40, bias).relu()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


def test_op_passes_torch_checks():
    _, tiles, _ = make(64, 32)
    for rows, int8 in [(2, False), (50, True)]:
        torch.library.opcheck(
            torch.ops.flashlite.int4_matmul.default,
            (torch.randn(rows, 32, requires_grad=True), tiles, 64, int8),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_inside(dtype):
    """Float16 would overflow on the unscaled sums."""
    _, tiles, step = make(64, 512)
    x = torch.full((60, 512), 300.0)
    with torch.no_grad():
        plain = int4_linear(x, tiles, step, 512, int8_activations=False)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(int4_linear(x, tiles, step, 512, int8_activations=False), plain)


def test_second_copy_of_the_file_shares_the_op(tmp_path, monkeypatch):
    """A checkpoint loaded with `trust_remote_code` brings its own copy of the module: both work afterwards."""
    (tmp_path / "copied").mkdir()
    for name in ("int4", "int8", "rare", "tiles"):
        shutil.copy(Path(int4.__file__).with_name(f"{name}_flashlite.py"), tmp_path / "copied")
    monkeypatch.syspath_prepend(tmp_path)
    copied = importlib.import_module("copied.int4_flashlite")
    _, tiles, step = make(64, 32)
    x = torch.randn(3, 32, requires_grad=True)
    values = [module.int4_linear(x, tiles, step, 32) for module in (int4, copied)]
    assert torch.equal(*values)
    assert torch.equal(*[torch.autograd.grad(value.sum(), x)[0] for value in values])


def test_kernel_copies_follow_their_tiles(monkeypatch):
    """Where the kernel wants another order, its copy is made once, renewed after a change, and dies with the tiles."""
    monkeypatch.setattr(int4, "_tiles_fit_kernel", lambda: False)
    _, tiles, step = make(64, 32)
    x = torch.randn(2, 32)
    first = int4_linear(x, tiles, step, 32)
    assert int4._kernel_form(tiles) is int4._kernel_form(tiles)
    twin = copy.deepcopy(tiles)
    assert torch.equal(int4_linear(x, twin, step, 32), first)
    tiles.copy_(make(64, 32, seed=1)[1])
    second = int4_linear(x, tiles, step, 32)
    assert relative_error(second, int4_linear_reference(x, tiles, step, 32)) < 6e-3
    assert tiles in int4._kernel_forms
    before = len(int4._kernel_forms)
    del tiles, twin
    assert len(int4._kernel_forms) == before - 2


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_processors(capability):
    """Processors whose kernel reads another order give the same numbers (PyTorch lets one ask for their code)."""
    code = (
        "import torch\n"
        "from tests.test_int4 import make, relative_error, int4_linear, int4_linear_reference\n"
        "for shape in [(64, 64), (200, 172)]:\n"
        "    _, tiles, step = make(*shape)\n"
        "    for rows in (1, 4, 40):\n"
        "        x = torch.randn(rows, shape[1])\n"
        "        with torch.no_grad():\n"
        "            error = relative_error(int4_linear(x, tiles, step, shape[1]),\n"
        "                int4_linear_reference(x, tiles, step, shape[1]))\n"
        "        assert error < 2e-2, error\n"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

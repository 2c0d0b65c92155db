"""Entropy-constrained quantization (ECQ): a bit budget for the file, 4-bit codes in memory, plain `from_pretrained`.

    AutoModelForCausalLM.from_pretrained("any/llama", quantization_config=EcqConfig(target_bits=3.0))

quantizes without data while loading. `calibration.quantize` uses data, `qat.prepare_qat` trains. The saved model
contains, under the name of each quantized weight, its entropy-coded bytes as a one-dimensional uint8 tensor (see
`ecq_stream_flashlite`), and everything else in bfloat16. Loading requires this module to be imported first, or
`trust_remote_code=True`, which imports the copy saved with the model (see `coded_flashlite`). Otherwise transformers
finds tensors of the wrong shape and raises, unless `ignore_mismatched_sizes=True` suppresses that.
"""

from __future__ import annotations

import itertools
import json
import struct
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .coded_flashlite import auto_map, coded_class, with_code, without_code
from .compat_flashlite import named_module
from .ecq_modules_flashlite import EcqModule, to_float, to_quantized
from .ecq_parents_flashlite import read_by_parents
from .ecq_probe_flashlite import scale_columns
from .ecq_search_flashlite import GRID, Layer, data_free_steps, search
from .ecq_stream_flashlite import decode_weights, encode_weight
from .ecq_twins_flashlite import FakeQuantModule, to_twin
from .ecq_weight_flashlite import QuantizedWeight
from .linear_flashlite import Linear

_METHOD = "ecq"
_SMALL = 1 << 20  # tensors up to this many bytes are copied out of the loader's memory map
_TRAINING_STATE = ("log_step", "log_base", "exponents", "column_exponents", "code_lengths", "ecq_rate")
_FIELDS = ("bits", "target_bits", "target_bytes", "max_loss_increase", "modules_to_not_convert", "stage")


def parse_bytes(size: int | str | None) -> int | None:
    """`3_000_000`, "3MB", "2.5 MiB", "800kB" to bytes."""
    if size is None or isinstance(size, int):
        return size
    text = size.strip().lower().replace(" ", "")
    units = {"kib": 1024, "mib": 1024**2, "gib": 1024**3, "kb": 1000, "mb": 10**6, "gb": 10**9, "b": 1}
    for unit, factor in units.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    raise ValueError(f"target_bytes={size!r} has no unit; write for example '3MB' or '2.5MiB'.")


class EcqConfig(QuantizationConfigMixin):
    """Configuration of entropy-constrained quantization.

    Args:
        bits (`int`, *optional*, defaults to 4): bits of a code in memory; 4 is the only choice.
        target_bits (`float`, *optional*): bits of the whole weights file over the number of parameters: codes, steps,
            tables, norms, embeddings and headers. Without a target, steps are half a standard deviation, about
            3.1 bits.
        target_bytes (`int` or `str`, *optional*): the same budget as a size, "3MB".
        max_loss_increase (`float`, *optional*): the smallest file whose perplexity on the calibration data rises by at
            most this fraction; needs `calibration.quantize`.
        modules_to_not_convert (`list[str]`, *optional*): modules that stay float, by beginnings, ends or regular
            expressions of their names; `layers.1` does not mean `layers.11`.
        stage (`str`, *optional*, defaults to `"coded"`): `"qat"` in checkpoints of quantization-aware training.
    """

    def __init__(
        self,
        bits: int = 4,
        target_bits: float | None = None,
        target_bytes: int | str | None = None,
        max_loss_increase: float | None = None,
        modules_to_not_convert: list[str] | None = None,
        stage: str = "coded",
    ):
        if bits != 4:
            raise ValueError(
                f"bits={bits} must be 4, the size of a code in memory; target_bits sets the size of the file."
            )
        if sum(target is not None for target in (target_bits, target_bytes, max_loss_increase)) > 1:
            raise ValueError("target_bits, target_bytes and max_loss_increase exclude each other; give one of them.")
        if target_bits is not None and not 0.5 <= target_bits <= 8:
            raise ValueError(f"target_bits={target_bits} is outside 0.5..8 bits per parameter.")
        if stage not in ("coded", "qat"):
            raise ValueError(f"stage={stage!r} must be 'coded' or 'qat'.")
        self.quant_method = _METHOD
        self.bits, self.target_bits, self.target_bytes = bits, target_bits, parse_bytes(target_bytes)
        self.max_loss_increase, self.modules_to_not_convert = max_loss_increase, modules_to_not_convert
        self.stage = stage

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """From `config.json`; unknown fields of later versions are ignored."""
        known = {key: value for key, value in config_dict.items() if key in _FIELDS}
        config = cls(**known)
        return (config, kwargs) if return_unused_kwargs else config

    def get(self, key, default=None):
        """Dictionary access, which transformers uses when a loaded config is passed to `from_pretrained`."""
        return getattr(self, key, default)

    def budget(self, parameters: int) -> float | None:
        """Bytes of the whole file, `None` without a target."""
        return (
            self.target_bytes
            if self.target_bytes is not None
            else self.target_bits and self.target_bits * parameters / 8
        )


_PLAIN_FORWARDS = (nn.Linear.forward, Linear.forward, nn.Embedding.forward, Conv1D.forward)
_OUR_LINEAR = ".linear_flashlite.Linear"
# embeddings of transformers whose forward only extends that of `nn.Embedding`; any other class with its own forward
# may need the weight itself, so it stays float
_EXTENDED_EMBEDDINGS = ("ScaledWordEmbedding", "NormedEmbedding", "LearnedPositionalEmbedding")


def _is_quantizable(module: nn.Module) -> bool:
    if isinstance(module, (EcqModule, FakeQuantModule)):
        return True
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or not isinstance(
        module, (nn.Linear, nn.Embedding, Conv1D)
    ):
        return False
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.num_embeddings <= 64):
        return False
    kind = type(module)
    # the package and copies from the Hub each have a `Linear`
    is_plain = kind.forward in _PLAIN_FORWARDS or f"{kind.__module__}.{kind.__name__}".endswith(_OUR_LINEAR)
    if not is_plain and not kind.__name__.endswith(_EXTENDED_EMBEDDINGS):
        return False
    shape = module.weight.shape
    return len(shape) == 2 and min(shape) >= 8 and shape.numel() >= 1024


def _left_out(model: nn.Module) -> set[str]:
    """Names of tensors that the model computes and does not save, such as Marian's table of positions."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def quantizable_layers(model: nn.Module, config: EcqConfig) -> dict[str, nn.Module]:
    """Name and module of every linear layer and embedding to be quantized, LM head and tied weights included.

    A weight that one of its modules, or a parent module, reads directly stays float in all of them.

    Raises:
        ValueError: the model keeps weights in stacked (3-D) parameters, as mixtures of experts do.
    """
    skip = config.modules_to_not_convert
    parameters = ((name, value) for name, value in model.named_parameters() if value.is_floating_point())
    stacked = [
        name for name, value in parameters if value.dim() == 3 and len(value) > 1 and "conv" not in name.lower()
    ]
    stacked = [name for name in stacked if not named_module(name.rpartition(".")[0], skip)]
    if stacked:
        raise ValueError(
            f"{type(model).__name__} keeps weights in stacked parameters ({stacked[0]}, {len(stacked)} in all),"
            " as mixtures of experts do; only nn.Linear, Conv1D and nn.Embedding can be quantized. Name their modules"
            " in modules_to_not_convert to leave them in bfloat16."
        )
    modules = dict(model.named_modules())
    layers = {n: m for n, m in modules.items() if _is_quantizable(m) and not named_module(n, skip)}
    needed = read_by_parents(model)
    layers = {n: m for n, m in layers.items() if f"{n}.weight" not in _left_out(model) and n not in needed}
    floats = {id(value) for n, m in modules.items() if n not in layers for value in m._parameters.values()}
    return {n: m for n, m in layers.items() if id(m.weight) not in floats}


def weight_of(module: nn.Module) -> torch.Tensor:
    """Float weight `[rows, columns]` of a layer before quantization."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def collect_layers(model: nn.Module, config: EcqConfig) -> list[Layer]:
    """The distinct weights to be quantized, with data-free steps: proportional to each row's standard deviation.

    Raises:
        ValueError: the model is quantized already, or has nothing to quantize.
    """
    method = getattr(model, "quantization_method", None)
    coded = any(isinstance(module, (EcqModule, FakeQuantModule)) for module in model.modules())
    if coded or method not in (None, _METHOD):
        raise ValueError(
            f"{type(model).__name__} is quantized already ({method or _METHOD}); call dequantize() first, or load the"
            " float original."
        )
    groups: dict[int, Layer] = {}
    for name, module in quantizable_layers(model, config).items():
        if id(module.weight) in groups:
            groups[id(module.weight)].names.append(name)
            groups[id(module.weight)].modules.append(module)
            continue
        weight = weight_of(module)
        layer = Layer([name], [module], weight, torch.zeros(len(weight), device=weight.device))
        layer.log_steps = data_free_steps(layer)
        groups[id(module.weight)] = layer
    if not groups:
        raise ValueError(f"{type(model).__name__} has no linear layer or embedding of at least 8 x 128 to quantize.")
    return list(groups.values())


def ids_of(layers: list[Layer]) -> set[int]:
    """Ids of the parameters of all layers."""
    return {id(module.weight) for layer in layers for module in layer.modules}


def overhead_bytes(model: nn.Module, coded: set[int]) -> int:
    """Bytes of the file besides the weight streams: other tensors in bfloat16 and the safetensors header.

    Args:
        coded (`set[int]`): ids of the parameters that become streams.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    size, end, seen = 0, 0, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or name.rpartition(".")[2] in _TRAINING_STATE or name in _left_out(model):
            continue
        seen.add(id(tensor))
        if id(tensor) in coded:
            held = tensor.numel() // 2  # only the number of digits of the offsets matters
            kind, shape = "U8", [held]
        else:
            kind, shape = ("BF16", tensor.shape) if tensor.is_floating_point() else ("I64", tensor.shape)
            held = tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size())
            size += held
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + held]}
        end += held
    return size + 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8


def install(model: nn.Module, layers: list[Layer], weights: list[QuantizedWeight]) -> None:
    """Put the codes of float layers into the model, in place, and round what stays float."""
    for layer, weight in zip(layers, weights):
        install_layer(model, layer, weight)
    round_rest(model, _coded_places(model).values())


@torch.no_grad()
def install_layer(model: nn.Module, layer: Layer, weight: QuantizedWeight) -> None:
    """Put the codes of one float layer, and of layers tied to it, into the model."""
    modules = [to_quantized(module) for module in layer.modules]
    for name, old, new in zip(layer.names, layer.modules, modules):
        if new is not old:
            model.set_submodule(name, new)
    modules[0].set_quantized(weight)
    for module in modules[1:]:
        module.share_quantized(modules[0])


@torch.no_grad()
def round_rest(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Round the tensors that stay float to bfloat16, as in the file; those of `modules` are or become codes."""
    # a module may stand in two places, as the resized table of an encoder-decoder does
    held = {id(module) for module in modules}
    coded = {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in held}
    left_out = _left_out(model)
    for name, value in model.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        if value.is_floating_point() and name not in left_out and (leaf == "bias" or parent not in coded):
            value.copy_(value.to(torch.bfloat16))


@torch.no_grad()
def install_groups(model: nn.Module, groups: list[tuple[list[str], list]], weights: list[QuantizedWeight]) -> None:
    """Set the codes of quantized modules, and round the tensors that stay float."""
    for (_, modules), weight in zip(groups, weights):
        modules[0].set_quantized(weight)
        for module in modules[1:]:
            module.share_quantized(modules[0])
    round_rest(model, _coded_places(model).values())


def attach(model, config: EcqConfig) -> None:
    """Mark a model that was quantized in memory as `from_pretrained` would."""
    model.hf_quantizer = EcqQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, _METHOD
    model.config._is_quantized = True
    _keep_names(model)


def _keep_names(model) -> None:
    """Save under the model's own names: streams cannot be split, joined or transposed for other formats.

    The vocabulary cannot be resized either: transformers would resize the placeholders of coded tables.
    """
    model._weight_conversions = []
    with_code(model, __name__)
    model.resize_token_embeddings = types.MethodType(_resize_token_embeddings, model)


def _resize_token_embeddings(model, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
    """Replaces [`PreTrainedModel.resize_token_embeddings`] in a quantized model.

    Raises:
        ValueError: for another size, where a table is quantized.
    """
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(table, (EcqModule, FakeQuantModule)) for table in tables):
        return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
    rows, multiple = tables[0].num_embeddings, pad_to_multiple_of or 1
    size = -(-(new_num_tokens or rows) // multiple) * multiple
    if size != rows:
        raise ValueError(
            f"The vocabulary of {rows} cannot be resized to {size} while its table is quantized; call dequantize() "
            "(or, in quantization-aware training, resize before prepare_qat), resize, and quantize again."
        )
    return tables[0]


def quantize_data_free(model, config: EcqConfig) -> None:
    """Quantize a float model in place to the budget of `config`, without data."""
    if config.max_loss_increase is not None:
        raise ValueError("max_loss_increase needs calibration data: call calibration.quantize(model, config, data).")
    fresh = _not_loaded(model)
    layers = [layer for layer in collect_layers(model, config) if fresh.isdisjoint(layer.names)]
    budget = config.budget(sum(p.numel() for p in model.parameters()))
    scale_columns(model, layers)
    install(model, layers, search(layers, budget, overhead_bytes(model, ids_of(layers))))


def _not_loaded(model) -> set[str]:
    """Names of layers missing from the checkpoint, such as a new head, which stay float to be trained.

    The loader marks every parameter that it has filled.
    """
    filled = {
        name: any(getattr(value, "_is_hf_initialized", False) for value in module._parameters.values())
        for name, module in model.named_modules()
        if _is_quantizable(module)
    }
    return {name for name, is_filled in filled.items() if not is_filled} if any(filled.values()) else set()


class EcqQuantizer(HfQuantizer):
    """Behind [`EcqConfig`]: loads coded checkpoints, quantizes float ones after loading, saves coded ones."""

    # newer versions' `serialized_names` and `get_load_operations` keep their defaults: a stream has the name of its
    # weight, and streams are decoded together after loading, since several weights may share one
    requires_calibration = False

    def validate_environment(self, *args, device_map=None, **kwargs):
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if "disk" in devices:
            raise ValueError("Quantized modules cannot be offloaded to disk; leave 'disk' out of device_map.")
        if not self.pre_quantized and (len(devices) > 1 or devices & {"auto", "balanced", "sequential"}):
            raise ValueError(
                f"Quantizing while loading needs the model on one device, got device_map={device_map!r}; quantize on"
                " one device, save, and load the saved model with this device_map."
            )

    def update_parallel_plan(self, model, plan):
        self.update_tp_plan(model.config)

    def update_tp_plan(self, config):  # transformers 5.16 calls this instead
        if getattr(config, "distributed_config", None) is not None:
            raise ValueError(
                "Entropy-coded weights cannot be split over processes; load without distributed_config and tp_plan, or"
                " load on one process, call dequantize(), save, and load that folder."
            )
        return config

    def param_needs_quantization(self, model, param_name, **kwargs) -> bool:
        """Whether a checkpoint tensor may have another shape than the parameter: the stream of a coded weight has."""
        module = model.get_submodule(param_name.rpartition(".")[0]) if "." in param_name else model
        return self.pre_quantized and isinstance(module, EcqModule) and param_name.endswith("weight")

    def _process_model_before_weight_loading(self, model, dtype=None, checkpoint_files=None, **kwargs):
        if not self.pre_quantized:
            return
        if self.quantization_config.stage == "qat":
            for name, module in quantizable_layers(model, self.quantization_config).items():
                rows, columns = weight_of(module).shape
                steps = torch.zeros(rows, dtype=torch.int8)
                empty = QuantizedWeight(steps[:, None], 1.0, steps, GRID)
                new = to_twin(module, empty, weight_of(module))
                if new is not module:
                    model.set_submodule(name, new)
            model.register_buffer("ecq_rate", torch.zeros(3, device="meta"))
            return
        coded = _coded_names(checkpoint_files)
        prefix = model.base_model_prefix + "."
        tied = model.all_tied_weights_keys
        for name, module in quantizable_layers(model, self.quantization_config).items():
            key = name + ".weight"
            names = {key, tied.get(key)} | {other for other, source in tied.items() if source in (key, tied.get(key))}
            names |= {prefix + n for n in names if n} | {n.removeprefix(prefix) for n in names if n}
            if coded is None or coded & {key, *names}:
                new = to_quantized(module, size_only=True)
                if new is not module:
                    model.set_submodule(name, new)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            quantize_data_free(model, self.quantization_config)
            self.pre_quantized = True
        elif self.quantization_config.stage == "coded":
            _decode_model(model)
        else:
            for _, twins in groups_of(model, FakeQuantModule):
                for twin in twins[1:]:
                    twin.share_twin(twins[0])
        _keep_names(model)
        return model

    def _dequantize(self, model, dtype=None):
        model.__dict__.pop("resize_token_embeddings", None)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        for names, modules in groups_of(model):
            weight = None
            for name, module in zip(names, modules):
                plain = to_float(module, dtype)
                if plain is not module:
                    model.set_submodule(name, plain)
                if weight is not None:
                    plain.weight = weight
                weight = plain.weight
        without_code(model)
        return model

    def get_state_dict_and_metadata(self, model):
        """The tensors of the file: streams for coded weights, bfloat16 for other floats."""
        if self.quantization_config.stage == "qat":
            state, seen = {}, set()
            for key, value in model.state_dict(keep_vars=True).items():
                if id(value) not in seen:
                    seen.add(id(value))
                    state[key] = value.detach()
            return state, {}
        if type(model).__module__ == __name__:
            model.config.auto_map = auto_map(model.config, __name__)
        streams = {id(modules[0].weight): encode_weight(modules[0].quantized()) for _, modules in groups_of(model)}
        places = _coded_places(model)
        state = {}
        memo = {}
        for key, value in model.state_dict().items():
            parent, _, leaf = key.rpartition(".")
            if parent in places and leaf != "bias":
                continue
            if value.is_floating_point():
                value = memo.setdefault((value.data_ptr(), value.shape), value.to(torch.bfloat16))
            state[key] = value
        return state | {f"{name}.weight": streams[id(module.weight)] for name, module in places.items()}, {}

    def is_serializable(self):
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return self.quantization_config.stage == "qat"

    @property
    def is_compileable(self) -> bool:
        return True


def _coded_names(checkpoint_files) -> set[str] | None:
    """Names of the one-dimensional uint8 tensors in safetensors files, from their headers; `None` without files."""
    if not checkpoint_files:
        return None
    names = set()
    for path in checkpoint_files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"Coded checkpoints are safetensors files only, got {path}.")
        entries, _ = safetensors_header(path)
        names |= {name for name, entry in entries.items() if entry["dtype"] == "U8" and len(entry["shape"]) == 1}
    return names


def safetensors_header(path) -> tuple[dict[str, dict], int]:
    """Dtype, shape and data offsets of every tensor in a safetensors file, and the byte where the data begin.

    Raises:
        ValueError: the header is damaged.
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100_000_000:
                raise ValueError(f"it claims {length} bytes")
            entries = dict(json.loads(file.read(length)))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            if not {"dtype", "shape", "data_offsets"} <= set(entry):
                raise ValueError(f"{name} has no dtype, shape or data_offsets")
    except (struct.error, ValueError, TypeError) as error:
        raise ValueError(f"The header of {path} is damaged ({error}); fetch the file again.") from error
    return entries, 8 + length


def groups_of(model: nn.Module, kind: type[Any] = EcqModule) -> list[tuple[list[str], list]]:
    """Names and modules of the quantized layers (or twins); those of one tied weight together."""
    groups: dict[int, tuple[list[str], list]] = {}
    for name, module in model.named_modules():
        if isinstance(module, kind):
            names, modules = groups.setdefault(id(module.weight), ([], []))
            names.append(name)
            modules.append(module)
    return list(groups.values())


def _coded_places(model: nn.Module) -> dict[str, EcqModule]:
    """Coded modules by name; one that stands in two places has both names."""
    places = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in places if isinstance(module, EcqModule)}


def _decode_model(model) -> None:
    """Decode the loaded streams to codes, a few at a time, freeing each one afterwards."""
    for value in itertools.chain(model.parameters(), model.buffers()):
        if value.device.type == "cpu" and value.nbytes <= _SMALL:
            value.data = value.data.clone()  # release the loader's mmap: touched pages stay resident
    jobs = []
    for names, modules in groups_of(model):
        owner = next((module for module in modules if module.stream is not None), None)
        if owner is None:
            raise ValueError(f"The checkpoint has no coded weight for {names[0]}; it does not fit this architecture.")
        jobs.append((names[0], modules, owner))
    streams = ((name, owner.take_stream(), owner.weight_shape) for name, _, owner in jobs)
    for position, weight in decode_weights(streams):
        _, modules, owner = jobs[position]
        owner.set_quantized(weight)
        for module in modules:
            if module is not owner:
                module.share_quantized(owner)


def use_this_quantizer() -> None:
    """Register the classes of this file with transformers for the method `ecq`.

    The package and copies of this file from the Hub may live in one process. A model, its quantizer and the layers
    of codes must be of one copy, so a Flash-Lite model calls this before it loads.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = EcqConfig
    AUTO_QUANTIZER_MAPPING[_METHOD] = EcqQuantizer


# models of other families have no copy of their own and use the first one
if _METHOD not in AUTO_QUANTIZER_MAPPING:
    use_this_quantizer()


def __getattr__(name: str) -> type:
    """Model classes of transformers by name, as the `auto_map` of coded checkpoints refers to them."""
    return coded_class(name, __name__)

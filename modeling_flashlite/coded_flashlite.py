"""Loading of coded models of other families with only transformers, PyTorch and NumPy installed.

transformers reads `quant_method` from config.json and knows only its own quantizers. So a coded Llama becomes an
instance of a subclass, `LlamaForCausalLM` in `quantization_flashlite`, which differs only in its module: as for any
custom class, `save_pretrained` then copies that file and its imports, and names it in `auto_map`. There,

    AutoModelForCausalLM.from_pretrained("you/coded-llama", trust_remote_code=True)

imports the file, which registers the quantizer, and asks it for the class; see `__getattr__` there.
"""

from __future__ import annotations

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

_CLASSES: dict[tuple[str, str], type[PreTrainedModel]] = {}


def coded_class(name: str, place: str) -> type[PreTrainedModel]:
    """The subclass of a transformers model class whose module is `place`.

    Raises:
        AttributeError: transformers has no such model class.
    """
    plain = None if name.startswith("_") else getattr(transformers, name, None)
    if not isinstance(plain, type) or not issubclass(plain, PreTrainedModel):
        raise AttributeError(f"module {place!r} has no attribute {name!r}")
    if (name, place) not in _CLASSES:
        # any name but None makes `save_pretrained` copy the code
        members = {"__module__": place, "__doc__": plain.__doc__, "_auto_class": "AutoModel"}
        _CLASSES[name, place] = type(name, (plain,), members)
    return _CLASSES[name, place]


def auto_map(config, place: str) -> dict[str, str]:
    """Auto class -> class of `place`, for all Auto classes that load the architecture."""
    fitting: dict[str, str] = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            model = mapping[type(config)]
            fitting[name] = f"{place.rpartition('.')[2]}.{(model if isinstance(model, type) else model[0]).__name__}"
    return fitting


def with_code(model: PreTrainedModel, place: str) -> None:
    """Make `model` an instance of its [`coded_class`], if its class is one of transformers' own."""
    plain = type(model)
    if plain._auto_class is None and getattr(transformers, plain.__name__, None) is plain:
        model.__class__ = coded_class(plain.__name__, place)


def without_code(model: PreTrainedModel) -> None:
    """Undo [`with_code`], for a model that is float again."""
    if type(model) in _CLASSES.values():
        model.__class__ = type(model).__bases__[0]
        model.config.__dict__.pop("auto_map", None)

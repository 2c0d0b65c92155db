"""Configuration of entropy-constrained quantization: a budget of bits or bytes for the whole file."""

from __future__ import annotations

import logging
import math
from numbers import Real

from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.getLogger(__name__)
METHOD = "ecq"
_FIELDS = ("bits", "target_bits", "target_bytes", "max_loss_increase", "modules_to_not_convert", "stage")


def parse_bytes(size: int | str | None) -> int | None:
    """`3_000_000`, "3MB", "2.5 MiB", "800kB" to bytes."""
    if size is None:
        return None
    held = size if isinstance(size, int) else _bytes_of(size) if isinstance(size, str) else 0
    if held < 1:
        raise ValueError(f"target_bytes={size!r} is no size; write for example 3_000_000, '3MB' or '2.5MiB'.")
    return held


def _bytes_of(size: str) -> int:
    """Bytes of a number with a unit; 0 for any other text."""
    text = size.strip().lower().replace(" ", "")
    units = {"kib": 1024, "mib": 1024**2, "gib": 1024**3, "kb": 1000, "mb": 10**6, "gb": 10**9, "b": 1}
    factor, unit = next(((factor, unit) for unit, factor in units.items() if text.endswith(unit)), (0, ""))
    try:
        return int(float(text.removesuffix(unit)) * factor)
    except (ValueError, OverflowError):
        return 0


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
        modules_to_not_convert (`list[str]` or `str`, *optional*): modules that stay float, by beginnings, ends or
            regular expressions of their names; `layers.1` does not mean `layers.11`.
        stage (`str`, *optional*, defaults to `"coded"`): `"qat"` in checkpoints of quantization-aware training.
    """

    def __init__(
        self,
        bits: int = 4,
        target_bits: float | None = None,
        target_bytes: int | str | None = None,
        max_loss_increase: float | None = None,
        modules_to_not_convert: list[str] | str | None = None,
        stage: str = "coded",
    ):
        if bits != 4:
            raise ValueError(
                f"bits={bits} must be 4, the size of a code in memory; target_bits sets the size of the file."
            )
        if sum(target is not None for target in (target_bits, target_bytes, max_loss_increase)) > 1:
            raise ValueError("target_bits, target_bytes and max_loss_increase exclude each other; give one of them.")
        if target_bits is not None and not (isinstance(target_bits, Real) and 0.5 <= target_bits <= 8):
            raise ValueError(f"target_bits={target_bits!r} must be a number of 0.5 to 8 bits per parameter.")
        if max_loss_increase is not None and not (
            isinstance(max_loss_increase, Real) and 0 <= max_loss_increase < math.inf
        ):
            raise ValueError(
                f"max_loss_increase={max_loss_increase!r} must be a share of the perplexity from 0; 0.05 is 5%."
            )
        if stage not in ("coded", "qat"):
            raise ValueError(f"stage={stage!r} must be 'coded' or 'qat'.")
        self.quant_method = METHOD
        self.bits, self.target_bits, self.target_bytes = bits, target_bits, parse_bytes(target_bytes)
        skipped = modules_to_not_convert
        self.modules_to_not_convert = [skipped] if isinstance(skipped, str) else skipped
        self.max_loss_increase = max_loss_increase
        self.stage = stage

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """From a dictionary, as in `config.json`; unknown fields, as of later versions, are ignored with a warning."""
        if unknown := sorted(set(config_dict) - {*_FIELDS, "quant_method"}):
            logger.warning(
                "%s in the quantization_config is ignored; its fields are %s.", ", ".join(unknown), ", ".join(_FIELDS)
            )
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

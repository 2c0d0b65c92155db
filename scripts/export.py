"""Export a checkpoint to ONNX and compare it with the model in ONNX Runtime.

    python scripts/export.py --model you/flash-lite-x --output exported
    python scripts/export.py --model runs/x --output exported --max_length 1024 --weights int8

Writes decoder.onnx (one graph for prompt and token steps, its cache as plain tensors), for an encoder-decoder also
encoder.onnx, onnx_config.json, and beside them tokenizer, config and generation settings; `OnnxGenerator` in
modeling_flashlite/publish/onnx_export.py runs them. GGUF and vLLM are not supported: they need the architecture in
their own code. Needs the `export` extra. The last line of output is JSON.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import modeling_flashlite  # noqa: F401  (registers the architecture)
from modeling_flashlite.checkpoint import CheckpointArgs, load_language_model, read_tokenizer
from modeling_flashlite.cli import parse_args, start
from modeling_flashlite.publish.hub import DownloadError, download
from modeling_flashlite.publish.onnx_export import ExportError, export_onnx, measure_parity, quantize_weights


@dataclass
class ExportArgs:
    output: str = field(metadata={"help": "folder for the graphs"})
    max_length: int = field(default=512, metadata={"help": "slots of the decoder's cache, a multiple of block_size"})
    weights: str = field(default="float32", metadata={"help": "of the graphs: float32 or int8"})
    tolerance: float | None = field(
        default=None, metadata={"help": "largest difference of a logit that is accepted; 1e-3, or 0.5 for int8"}
    )


def main(argv: list[str] | None = None) -> int:
    """Export and compare; 1 when they differ, 2 when the checkpoint cannot be exported."""
    checkpoint, args = parse_args((CheckpointArgs, ExportArgs), argv, description=__doc__)
    output = Path(args.output)
    if args.weights not in ("float32", "int8"):
        print(f"export: weights is {args.weights!r}, but must be float32 or int8.", file=sys.stderr)
        return 2
    try:
        folder = download(checkpoint.model, checkpoint.revision)
        model = load_language_model(str(folder), device="cpu", dtype=checkpoint.dtype, **checkpoint.hub)
        if getattr(model, "is_quantized", False):
            print(
                f"ONNX has no operator for entropy-coded weights: exporting their values as {args.weights}", flush=True
            )
            model = model.dequantize()
        files = export_onnx(model, output, args.max_length)
        for path in files:
            if args.weights == "int8" and path.suffix == ".onnx":
                quantize_weights(path)
        read_tokenizer(str(folder), **checkpoint.hub).save_pretrained(output)
    except (ExportError, DownloadError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    parity = measure_parity(model, output)
    for path in sorted(output.iterdir()):
        print(f"{path.stat().st_size:>14,}  {path.name}")
    for name, value in parity.items():
        print(f"{name:>14}  {value:.3g}")
    tolerance = args.tolerance or {"float32": 1e-3, "int8": 0.5}[args.weights]
    good = max(value for name, value in parity.items() if name != "generate") <= tolerance
    print(json.dumps({"files": [path.name for path in files], "parity": parity, "equal": good}))
    return 0 if good else 1


if __name__ == "__main__":
    start(main)

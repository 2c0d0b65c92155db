"""Export a checkpoint to ONNX and compare it with the model in ONNX Runtime.

    python scripts/export.py --model you/flash-lite-x --output exported
    python scripts/export.py --model runs/x --output exported --max_length 1024

Writes decoder.onnx (one graph for prompt and token steps, its cache as plain tensors), for an encoder-decoder also
encoder.onnx, and onnx_config.json; `OnnxGenerator` in modeling_flashlite/publish/onnx_export.py runs them. GGUF and
vLLM are not supported: they need the architecture in their own code. Needs the `export` extra. The last line of output
is JSON.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import modeling_flashlite  # noqa: F401  (registers the architecture)
from modeling_flashlite.checkpoint import CheckpointArgs, load_language_model
from modeling_flashlite.cli import parse_args, start
from modeling_flashlite.publish.hub import DownloadError, download
from modeling_flashlite.publish.onnx_export import ExportError, export_onnx, measure_parity


@dataclass
class ExportArgs:
    output: str = field(metadata={"help": "folder for the graphs"})
    max_length: int = field(default=512, metadata={"help": "slots of the decoder's cache, a multiple of block_size"})
    tolerance: float = field(default=1e-3, metadata={"help": "largest difference of a logit that is accepted"})


def main(argv: list[str] | None = None) -> int:
    """Export and compare; 1 when they differ, 2 when the checkpoint cannot be exported."""
    checkpoint, args = parse_args((CheckpointArgs, ExportArgs), argv, description=__doc__)
    output = Path(args.output)
    try:
        folder = download(checkpoint.model, checkpoint.revision)
        model = load_language_model(str(folder), device="cpu", dtype=checkpoint.dtype, **checkpoint.hub)
        if getattr(model, "is_quantized", False):
            print("ONNX has no operator for entropy-coded weights: exporting their float values", flush=True)
            model = model.dequantize()
        files = export_onnx(model, output, args.max_length)
    except (ExportError, DownloadError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    parity = measure_parity(model, output)
    for path in sorted(output.iterdir()):
        print(f"{path.stat().st_size:>14,}  {path.name}")
    for name, value in parity.items():
        print(f"{name:>14}  {value:.3g}")
    good = max(value for name, value in parity.items() if name != "generate") <= args.tolerance
    print(json.dumps({"files": [path.name for path in files], "parity": parity, "equal": good}))
    return 0 if good else 1


if __name__ == "__main__":
    start(main)

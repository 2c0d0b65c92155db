"""Export a checkpoint to ONNX and compare it with the model in ONNX Runtime.

    python scripts/export.py --model you/flash-lite-x --output exported
    python scripts/export.py --model runs/x --output exported --max-length 1024

Writes decoder.onnx (one graph for prompt and token steps, its cache as plain tensors), for an encoder-decoder also
encoder.onnx, and onnx_config.json; `OnnxGenerator` in modeling_flashlite/publish/onnx_export.py runs them. GGUF and
vLLM are not supported: they need the architecture in their own code. Needs the `export` extra. The last line is JSON.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import modeling_flashlite  # noqa: F401  (registers the architecture)
from modeling_flashlite.publish.hub import DownloadError, download
from modeling_flashlite.publish.onnx_export import ExportError, export_onnx, measure_parity


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="Hub id or folder")
    add("--revision", help="branch, tag or commit")
    add("--output", type=Path, required=True, help="folder for the graphs")
    add("--max-length", type=int, default=512, help="slots of the decoder's cache, a multiple of block_size")
    add("--tolerance", type=float, default=1e-3, help="largest difference of a logit that is accepted")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Export and compare; 1 when they differ, 2 when the checkpoint cannot be exported."""
    args = make_parser().parse_args(argv)
    try:
        folder = download(args.model, args.revision)
        config = AutoConfig.from_pretrained(folder)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto_class.from_pretrained(folder)
        if getattr(model, "is_quantized", False):
            print("ONNX has no operator for entropy-coded weights: exporting their float values", flush=True)
            model = model.dequantize()
        files = export_onnx(model, args.output, args.max_length)
    except (ExportError, DownloadError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    parity = measure_parity(model, args.output)
    for path in sorted(args.output.iterdir()):
        print(f"{path.stat().st_size:>14,}  {path.name}")
    for name, value in parity.items():
        print(f"{name:>14}  {value:.3g}")
    good = max(value for name, value in parity.items() if name != "generate") <= args.tolerance
    print(json.dumps({"files": [path.name for path in files], "parity": parity, "equal": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

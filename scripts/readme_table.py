"""Rewrite the table in README.md from the results file of the demo: no number in README is typed by hand.

python scripts/readme_table.py
python scripts/readme_table.py --results runs/demo/results.json --check
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- demo results: made by scripts/readme_table.py -->", "<!-- end of demo results -->"


def render(results: dict) -> str:
    """Markdown table of the stages, and one line that says where the numbers come from."""
    lines = [
        "| stage | parameters | bits per weight | weights on disk | perplexity |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in results["stages"]:
        lines.append(
            f"| {row['stage']} | {row['parameters'] / 1e6:.2f} M | {row['bits_per_weight']:.2f} "
            f"| {row['file_bytes'] / 1e6:.2f} MB | {row['perplexity']:.1f} |"
        )
    lines += [
        "",
        f"Perplexity per token of held-out Python documentation, seed {results['seed']}; written by "
        "`make card` from `model_cards/results/demo.json`, which `scripts/demo.py` makes.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=ROOT / "model_cards/results/demo.json", type=Path)
    parser.add_argument("--readme", default=ROOT / "README.md", type=Path)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if README differs")
    args = parser.parse_args()
    text = args.readme.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        sys.exit(f"{args.readme} has no lines {START!r} and {END!r} to write between; put them back.")
    results = json.loads(args.results.read_text(encoding="utf-8"))
    new = f"{before}{START}\n{render(results)}\n{END}{after}"
    if args.check:
        return int(new != text)
    args.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

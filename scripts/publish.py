"""Publish a checkpoint with its code and a model card in one commit; without --push only say what would happen.

    python scripts/publish.py --run runs/x --repo you/flash-lite-x
    python scripts/publish.py --run runs/x --repo you/flash-lite-x --push

The card takes its words from card.yaml in the run and its numbers from the results files in its results/ folder (or
from --card and --results). An incomplete card does not publish. The access token comes from HF_TOKEN or from
`hf auth login`, never from the command line. The last line printed is JSON.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from modeling_flashlite.publish.cards import (
    collect_card,
    load_written,
    missing_fields,
    read_results,
    render_card,
    run_snippet,
)
from modeling_flashlite.publish.hub import Publisher
from modeling_flashlite.publish.repository import PublishError, list_files, stage


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of a saved model or of a training run")
    add("--repo", required=True, help="repository, user/name")
    add("--push", action="store_true", help="upload; without it nothing leaves this machine")
    add("--save", type=Path, help="also write the complete repository to this folder")
    add("--card", type=Path, help="card.yaml (default: the one in the run)")
    add("--results", type=Path, nargs="*", help="results files (default: results/*.json in the run)")
    add("--task", help="what an encoder-decoder is for: translation, summarization, abstractive-qa, ...")
    add("--message", default="Publish checkpoint", help="title of the commit")
    add("--branch", help="branch to commit to")
    add("--tag", help="tag that the card pins (default: one that follows from the files)")
    add("--pr", action="store_true", help="open a pull request instead of committing")
    add("--private", action="store_true", help="make a new repository private")
    add("--gated", choices=("auto", "manual"), help="ask readers to request access")
    add("--parent-commit", help="refuse unless the branch still stands at this commit")
    return parser


def prepare(args: argparse.Namespace, folder: Path) -> tuple[dict, list[str]]:
    """Stage the files and write the card; return the card's fields and what it lacks."""
    written = load_written(args.card or args.run / "card.yaml")
    results = read_results(args.results if args.results is not None else sorted(args.run.glob("results/*.json")))
    base = written.get("base_model")
    task = args.task or written.get("task")
    stage(args.run, folder, task=task, base_model=base if base not in (None, "none") else None)
    card = collect_card(folder, args.repo, results, written, revision=args.tag)
    try:
        card["snippet_output"] = run_snippet(card, folder, args.run) if card["example"] else None
    except PublishError as error:
        return card, [str(error), *missing_fields({**card, "snippet_output": "failed"})]
    missing = missing_fields(card)
    if not missing:
        (folder / "README.md").write_text(render_card(card), encoding="utf-8")
    return card, missing


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when published or ready, 1 when something is missing or refused."""
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "repository"
        try:
            card, missing = prepare(args, folder)
            files = list_files(folder)
            for file in files:
                print(f"{file.size:>14,}  {file.sha256[:12]}  {file.name}")
            print(f"{sum(file.size for file in files):>14,}  bytes in {len(files)} files for {args.repo}")
            for line in missing:
                print(f"missing  {line}")
            report = {"repo": args.repo, "files": len(files), "missing": len(missing), "pushed": False}
            if not missing and args.save:
                shutil.copytree(folder, args.save, dirs_exist_ok=True)
            if args.push and not missing:
                done = Publisher(args.repo).publish(
                    folder,
                    message=args.message,
                    private=args.private or None,
                    gated=args.gated,
                    branch=args.branch,
                    tag=None if args.pr else card["revision"],
                    create_pr=args.pr,
                    parent_commit=args.parent_commit,
                )
                report |= {"pushed": True, **done}
            elif not missing:
                print("dry run: nothing was sent; add --push to publish")
        except PublishError as error:
            print(f"publish: {error}", file=sys.stderr)
            return 1
    print(json.dumps(report))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

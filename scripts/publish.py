"""Publish a checkpoint with its code and a model card in one commit; without --push, only report what would be sent.

    python scripts/publish.py --run runs/x --repo you/flash-lite-x
    python scripts/publish.py --run runs/x --repo you/flash-lite-x --push

The card's text comes from card.yaml in the run, its numbers from the results files in the run's results/ folder (or
from --card and --results). An incomplete card is not published. The access token is read from HF_TOKEN or from `hf
auth login`, never from the command line. The last line of output is JSON.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from modeling_flashlite.cli import parse_args, start
from modeling_flashlite.measure.results import read_results
from modeling_flashlite.publish.cards import (
    collect_card,
    load_written,
    missing_fields,
    render_card,
    run_snippet,
)
from modeling_flashlite.publish.hub import Publisher
from modeling_flashlite.publish.repository import PublishError, list_files, stage


@dataclass
class PublishArgs:
    run: str = field(metadata={"help": "folder of a saved model or of a training run"})
    repo: str = field(metadata={"help": "repository, user/name"})
    push: bool = field(default=False, metadata={"help": "upload; without it nothing leaves this machine"})
    save: str | None = field(default=None, metadata={"help": "also write the complete repository to this folder"})
    card: str | None = field(default=None, metadata={"help": "card.yaml (default: the one in the run)"})
    results: list[str] | None = field(
        default=None, metadata={"help": "results files (default: results/*.json in the run)"}
    )
    task: str | None = field(
        default=None, metadata={"help": "what an encoder-decoder is for: translation, summarization, abstractive-qa"}
    )
    message: str = field(default="Publish checkpoint", metadata={"help": "title of the commit"})
    branch: str | None = field(default=None, metadata={"help": "branch to commit to"})
    tag: str | None = field(default=None, metadata={"help": "tag that the card pins (default: made from the files)"})
    pr: bool = field(default=False, metadata={"help": "open a pull request instead of committing"})
    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    gated: str | None = field(default=None, metadata={"help": "ask readers to request access: auto or manual"})
    parent_commit: str | None = field(
        default=None, metadata={"help": "refuse unless the branch still stands at this commit"}
    )

    def __post_init__(self):
        if self.gated not in (None, "auto", "manual"):
            raise ValueError(f"gated is {self.gated!r}, but must be auto or manual")


def prepare(args: PublishArgs, folder: Path) -> tuple[dict, list[str]]:
    """Stage the files and write the card; return the card's fields and those that are missing."""
    run = Path(args.run)
    written = load_written(Path(args.card) if args.card else run / "card.yaml")
    results = read_results(args.results if args.results is not None else sorted(run.glob("results/*.json")))
    base = written.get("base_model")
    task = args.task or written.get("task")
    stage(run, folder, task=task, base_model=base if base not in (None, "none") else None)
    card = collect_card(folder, args.repo, results, written, revision=args.tag)
    try:
        card["snippet_output"] = run_snippet(card, folder, run) if card["example"] else None
    except PublishError as error:
        return card, [str(error), *missing_fields({**card, "snippet_output": "failed"})]
    missing = missing_fields(card)
    if not missing:
        (folder / "README.md").write_text(render_card(card), encoding="utf-8")
    return card, missing


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when published or ready, 1 when something is missing or refused."""
    (args,) = parse_args((PublishArgs,), argv, description=__doc__)
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
        except (PublishError, ValueError) as error:
            print(f"publish: {error}", file=sys.stderr)
            return 1
    print(json.dumps(report))
    return 1 if missing else 0


if __name__ == "__main__":
    start(main)

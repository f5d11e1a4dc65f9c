"""`lsp push`: upload a trained model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from language_self_play.cli import Parser
from language_self_play.errors import ConfigError

if TYPE_CHECKING:
    from language_self_play.publish import Upload

DESCRIPTION = """\
Upload the model of a finished run, with its tokenizer and model card, to the Hugging Face hub.

The repository is made if it isn't there. Log in once with `hf auth login`, or set HF_TOKEN to a
token with write permission. The card is README.md in the run's model/ or adapter/; read it, and
edit it if you like, before you push."""

EPILOG = """\
examples:
  lsp push runs/arena you/arena-lsp --dry-run       show what would be sent
  lsp push runs/arena you/arena-lsp --private
  lsp push runs/lora you/lora-lsp --adapter         the LoRA adapter alone
  lsp push runs/long you/long-lsp --checkpoint 500 --branch step-500

exit codes: 0 done, 2 bad input (also: a token that may not write), 75 the hub is away or busy,
run the same command again"""


def run(arguments: list[str]) -> int:
    parser = Parser(prog="lsp push", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME on the hub")
    parser.add_argument("--adapter", action="store_true", help="its LoRA adapter, not the model")
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="a checkpoint's model, not the final one"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--branch", metavar="NAME", help="branch to push to (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be sent; send nothing"
    )
    options = parser.parse_args(arguments)
    for name in ("run", "branch", "message"):
        if getattr(options, name) == "":
            raise ConfigError(f"{name if name == 'run' else f'--{name}'} is empty")

    from language_self_play.publish import check_repo_id, choose_upload, hub_endpoint, push

    check_repo_id(options.repo_id)
    endpoint = hub_endpoint()
    upload = choose_upload(Path(options.run), options.adapter, options.checkpoint)
    branch = f", branch {options.branch}" if options.branch else ""
    print(f"{upload.folder} → {endpoint}/{options.repo_id}{branch}")
    _print_files(upload)
    if options.dry_run:
        print("Nothing was sent. Run it without --dry-run to push.")
        return 0
    pushed = push(upload, options.repo_id, options.private, options.branch, options.message)
    print("Pushed:" if pushed.changed else "Nothing has changed since the last push:", pushed.url)
    return 0


def _print_files(upload: Upload) -> None:
    sizes = [("README.md", len(upload.card.encode()))]
    sizes += [(file.name, file.stat().st_size) for file in upload.files]
    for name, size in sizes:
        print(f"  {name:<32}{_readable(size):>10}")
    print(f"  {f'{len(sizes)} files':<32}{_readable(sum(size for _, size in sizes)):>10}")
    if upload.left_out:
        print(f"  left out: {', '.join(upload.left_out)}")


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"

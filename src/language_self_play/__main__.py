"""`python -m language_self_play` is the `lsp` command."""

from language_self_play.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""`lsp config`: every setting with its type, default and meaning."""

from __future__ import annotations

import json
import textwrap

from language_self_play.cli import Parser


def run(arguments: list[str]) -> int:
    parser = Parser(
        prog="lsp config",
        description="Every setting with its type, default and meaning, as TOML names and flags.",
    )
    parser.add_argument("section", nargs="?", metavar="NAME", help="only names that begin so")
    parser.add_argument("--json", action="store_true", help="as JSON, one object a setting")
    options = parser.parse_args(arguments)

    from language_self_play.config import Config
    from language_self_play.errors import ConfigError
    from language_self_play.settings import fields, kinds

    chosen = [f for f in fields(Config) if f.name.startswith(options.section or "")]
    if not chosen:
        raise ConfigError(f"{options.section}: no setting's name begins so")
    if options.json:
        for field in chosen:
            print(json.dumps(field._asdict()))
        return 0
    kind = None
    for field in chosen:
        if field.kind != kind and field.kind is not None:
            print(f'[reward.NAME] with kind = "{field.kind}"; NAME is yours to choose')
            print(textwrap.indent(textwrap.fill(kinds(Config)[field.kind], 88), "    "))
        kind = field.kind
        if field.required:
            default = "required"
        elif field.default is None:
            default = "unset"
        else:
            default = json.dumps(field.default, ensure_ascii=False)
        print(f"{field.name}  ({field.type}; {default})")
        print(textwrap.indent(textwrap.fill(field.description, 88), "    "))
    return 0

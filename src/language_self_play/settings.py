"""A tree of pydantic settings as people meet it: its fields listed, its mistakes in sentences.

Knows none of this program's own settings (config.py), only how the tree is made: sections below
sections, and tables of named parts, each part told from others by its `kind`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pydantic
from pydantic import BaseModel

Tree = type[BaseModel]


class FieldInfo(NamedTuple):
    """One setting as `lsp config` lists it. `kind` is set where only parts of that kind have it."""

    name: str
    type: str
    default: Any
    required: bool
    description: str
    kind: str | None = None


def fields(section: Tree, prefix: str = "", kind: str | None = None) -> Iterator[FieldInfo]:
    """Every setting, in order, with dotted names; those of named parts as `reward.NAME.field`."""
    for name, field in section.model_fields.items():
        if below := _section_of(field.annotation):
            yield from fields(below, f"{prefix}{name}.", kind)
        elif parts := _parts_of(field.annotation):
            for part_kind, part in parts.items():
                yield from fields(part, f"{prefix}{name}.NAME.", part_kind)
        elif name != "kind":
            yield FieldInfo(
                name=prefix + name,
                type=type_name(field.annotation),
                default=None
                if field.is_required()
                else field.get_default(call_default_factory=True),
                required=field.is_required(),
                description=field.description or "",
                kind=kind,
            )


def flag_of_table(name: str, tree: Tree) -> str | None:
    """A flag by which a setting of the section `name` is given; None if it is no section with defaults."""
    for field in fields(tree):
        within = field.name.startswith(f"{name}.") and ".NAME." not in field.name
        if within and type(field.default) in (int, float, str):
            return f"--{field.name} {field.default}"
    return None


def kinds(section: Tree) -> dict[str, str]:
    """Kind -> what it is, for every named part that can be configured."""
    return {
        kind: (part.__doc__ or "").strip()
        for field in section.model_fields.values()
        for kind, part in _parts_of(field.annotation).items()
        if kind is not None
    }


def _section_of(annotation: Any) -> Tree | None:
    """The section that a field holds, if it holds one (or, being optional, none)."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part if get_origin(annotation) is not dict else None
    return None


def _parts_of(annotation: Any) -> dict[str | None, Tree]:
    """Kind -> section, of a field that holds a table of named parts; None if there are no kinds."""
    if get_origin(annotation) is not dict:
        return {}
    parts = get_args(annotation)[1]
    if isinstance(parts, type):
        return {None: parts} if issubclass(parts, BaseModel) else {}
    union = get_args(parts)[0] if get_origin(parts) is Annotated else parts
    return {
        get_args(part.model_fields["kind"].annotation)[0]: part
        for part in get_args(union)
        if isinstance(part, type) and issubclass(part, BaseModel)
    }


def type_name(annotation: Any) -> str:
    """A type as a person would write it: `float`, `text`, `"a" | "b"`, `list of text`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f'"{a}"' for a in args)
    if origin is Annotated:
        return type_name(args[0])
    if origin in (Union, UnionType):
        return " | ".join(type_name(a) for a in args if a is not NoneType)
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return "table"
    return {str: "text", int: "int", float: "float", bool: "true | false"}.get(
        annotation, str(annotation)
    )


# ---------------------------------------------------------------- mistakes


def sentences(error: pydantic.ValidationError, tree: Tree) -> list[str]:
    """One sentence for each mistake; the branches of a union are one mistake."""
    by_name: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        name, sentence = _sentence(problem, tree)
        by_name.setdefault(name or sentence, sentence)
    return list(by_name.values())


def _sentence(problem: Mapping[str, Any], tree: Tree) -> tuple[str, str]:
    """(name of the setting, what is wrong with it)."""
    # Unions put their branch into the location (a kind, or a type); the user never typed it there.
    location = [str(part) for part in problem["loc"]]
    kind = None
    names = _place_of_name(location, tree)
    if names is not None and names.have_kinds and len(location) > names.place + 1:
        kind = location.pop(names.place + 1)
    branches = [part for part in location if part == "str" or part.startswith("list[")]
    if branches:
        location = location[: location.index(branches[0])]
    name = ".".join(location)
    given = repr(problem["input"])
    match problem["type"]:
        case "extra_forbidden":
            sentence = _unknown_name(name, location, kind, tree)
        case "missing":
            meaning = _description(location, kind, tree)
            sentence = f"{name}: missing; it has no default ({meaning})"
        case "value_error":
            sentence = str(problem["ctx"]["error"])
            if not sentence.startswith(tuple(tree.model_fields)):
                sentence = f"{name}: {sentence}"  # from a section that does not know its own name
        case "union_tag_invalid" | "union_tag_not_found":
            kind = problem["input"].get("kind") if isinstance(problem["input"], dict) else None
            shown = f"{kind!r} is unknown" if kind else "missing"
            sentence = f"{name}.kind: {shown}; one of {', '.join(kinds(tree))}"
        case "model_type" | "dict_type" | "model_attributes_type":
            flag = flag_of_table(name, tree)
            flags = f", or flags such as {flag}" if flag else ""
            sentence = f"{name} = {given}: must be a table, such as [{name}]{flags}"
        case "string_type" | "list_type" | "too_short" if branches:
            sentence = f"{name} = {given}: must be text or a list of at least one text"
        case "string_pattern_mismatch" if location[-1] == "[key]":
            name = ".".join(location[:-2])
            sentence = f"{name}: {given} can't be a name; use letters, digits, '_', '-' and '.'"
        case "string_pattern_mismatch":
            meaning = _description(location, kind, tree)
            sentence = f"{name} = {given}: must be one of: {meaning}"
        case _:
            reason = problem["msg"].removeprefix("Input ").replace("should", "must")
            sentence = f"{name} = {given}: {reason}"
    return name, sentence


def _unknown_name(name: str, location: list[str], kind: str | None, tree: Tree) -> str:
    *sections, leaf = location
    if (names := _place_of_name(location, tree)) is not None:
        sections[names.place] = "NAME"
    prefix = "".join(f"{s}." for s in sections)
    everything = list(fields(tree))
    known = {
        f.name.removeprefix(prefix).split(".")[0]
        for f in everything
        if f.name.startswith(prefix) and f.kind == kind
    }
    if not sections:
        known |= set(tree.model_fields)
    if near := difflib.get_close_matches(leaf, sorted(known), n=1):
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?"
    elif elsewhere := difflib.get_close_matches(
        leaf, [f.name.rsplit(".", 1)[-1] for f in everything], n=1
    ):
        full = next(f for f in everything if f.name.rsplit(".", 1)[-1] == elsewhere[0])
        of_kind = f" of kind {full.kind}" if full.kind else ""
        hint = f"did you mean {full.name}{of_kind}?"
    else:
        hint = "`lsp config` lists every setting"
    return f"{name}: no such setting; {hint}"


def _description(location: list[str], kind: str | None, tree: Tree) -> str:
    if (names := _place_of_name(location, tree)) is not None:
        location = [*location[: names.place], "NAME", *location[names.place + 1 :]]
    known = {f.name: f.description for f in fields(tree) if f.kind == kind}
    return known.get(".".join(location), "`lsp config` lists every setting").rstrip(".")


class _Names(NamedTuple):
    """Where in a location the name stands that the user gave a part, and whether parts have kinds."""

    place: int
    have_kinds: bool


def _place_of_name(location: list[str], tree: Tree) -> _Names | None:
    """None if nothing in `location` is a name of the user's, or it ends with that name."""
    section: Tree | None = tree
    for place, part in enumerate(location[:-2], 1):
        field = section.model_fields.get(part) if section else None
        if field is None:
            return None
        if parts := _parts_of(field.annotation):
            return _Names(place, None not in parts)
        section = _section_of(field.annotation)
    return None

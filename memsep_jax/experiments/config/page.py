"""docs/configs.md: every config file and every field, from the files and the schema.

python -m memsep_jax.experiments.config.page > docs/configs.md
"""

import ast
import sys
import textwrap
from pathlib import Path

from memsep_jax.experiments.config.fields import (
    RESULT,
    ROLES,
    STOPS,
    WATCHED,
    Field,
    Group,
)
from memsep_jax.experiments.config.schema import AUDIT, TRAIN, leaves, marked

SCHEMAS = {
    "Fields of a training, and of studies that train": TRAIN,
    "Fields of an audit": AUDIT,
}
WIDTH, IN = 80, " " * 6  # columns of a terminal, and before a help text


def page(configs: Path) -> str:
    """docs/configs.md.   Args: configs, the folder of the config files."""
    lines = [
        "# Configs",
        "",
        "A config file says what differs from the defaults. This page is made by",
        "",
        "    python -m memsep_jax.experiments.config.page > docs/configs.md",
        "",
        "## Files",
        "",
        "Run one with `python -m memsep_jax.main --config=configs/FILE.py[:VARIANT]`.",
        "",
        "| File | What it asks | Variants |",
        "|---|---|---|",
        *map(_file_row, sorted(configs.glob("*.py"))),
        "",
        "## Roles",
        "",
        "A role says what a change of the field means for a workdir that holds a run.",
        "",
        *(f"- **{role}**: {words}." for role, words in ROLES.items()),
        "",
        f"Where {' or '.join(f'`{name}`' for name in marked(STOPS))} may end training",
        "early, it depends on these fields too: "
        + ", ".join(f"`{name}`" for name in marked(WATCHED))
        + ".",
        "",
    ]
    for title, known in SCHEMAS.items():
        lines += [f"## {title}", ""]
        alone = {name: one for name, one in known.items() if isinstance(one, Field)}
        lines += _table("", Group("", RESULT, alone, named=False))
        for name, one in known.items():
            if isinstance(one, Group):
                lines += [f"### {name}", "", one.help, "", *_table(name, one)]
    return "\n".join(lines)


def plain() -> str:
    """Every field with type, default, rule and help, for a terminal."""
    lines = []
    for title, known in SCHEMAS.items():
        lines += [f"{title}:", ""]
        for name, field, _ in leaves(known):
            about = field.kind.__name__
            if field.default is not None:
                about += f" = {field.default!r}"
            if field.rule:
                about += f"; {field.rule.text()}"
            lines.append(f"  --config.{name}: {about}")
            text = field.help + _only(field)
            lines += textwrap.wrap(text, WIDTH, initial_indent=IN, subsequent_indent=IN)
        lines.append("")
    return "\n".join(lines)


def _only(field):
    return f" Only for {', '.join(field.of)}." if field.of else ""


def _table(name, group):
    rows = [
        "| Field | Type | Default | Rule | Role | What it is |",
        "|" + "---|" * 6,
    ]
    for field, known in group.fields.items():
        default = "" if known.default is None else f"`{known.default!r}`"
        rule = known.rule.text() if known.rule else ""
        cells = (
            f"`{name}.{field}`" if name else f"`{field}`",
            known.kind.__name__, default, rule, known.role or group.role,
            known.help + _only(known),
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return [*rows, ""]


def _file_row(path):
    # Read and not run: a file of a config is code.
    tree = ast.parse(path.read_text())
    first = (ast.get_docstring(tree) or "").partition("\n")[0]
    variants = {"full": None, "smoke": None}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "variant_of"
        ):
            variants |= {keyword.arg: None for keyword in node.keywords}
    return f"| `{path.name}` | {first} | {', '.join(variants)} |"


if __name__ == "__main__":
    sys.stdout.write(page(Path("configs")))

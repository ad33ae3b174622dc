"""The directive ``command-line``: the reference of all commands, from their parsers."""

import argparse
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from dask_imgread.cli.arguments import make_parser


class CommandLine(SphinxDirective):
    """A section for each command: what it does, its arguments, examples; then exit statuses."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        (commands,) = (
            action
            for action in make_parser()._actions
            if isinstance(action, argparse._SubParsersAction)
        )
        lines = [line for parser in commands.choices.values() for line in describe_command(parser)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def describe_command(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the lines of a command's section."""
    name = parser.prog.rpartition(" ")[2]
    yield from (format_section(name), parser.description or "", "")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            title = str(group.title).capitalize()
            yield from (f".. rubric:: {title}", "", f".. program:: {parser.prog}", "")
        for action in actions:
            yield from describe_argument(parser, action)
    yield from format_epilog(parser.epilog or "")


def format_section(title: str) -> str:
    """Return the lines of a section's title."""
    return f"\n{title}\n{'=' * len(title)}\n"


def describe_argument(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    """Yield the lines of an argument, with argparse's own text for it."""
    formatter = parser._get_formatter()
    yield f".. option:: {formatter._format_action_invocation(action)}"
    yield from ("", f"   {escape(formatter._expand_help(action))}", "")


def format_epilog(epilog: str) -> Iterator[str]:
    """Yield the lines of a command's examples."""
    title, _, examples = epilog.partition("\n")
    yield from (f".. rubric:: {title.rstrip(':').capitalize()}", "", ".. code-block:: sh", "")
    yield from (f"   {line.strip()}" for line in examples.splitlines())


def escape(text: str) -> str:
    """Return a text without markup."""
    return "".join(f"\\{letter}" if letter in "\\*`_|" else letter for letter in text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True}

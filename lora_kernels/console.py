"""Where tables are printed: stdout, where a file or a pipe cuts no column of them."""

from rich.console import Console

__all__ = ["on_stdout"]

_UNBOUNDED = 10_000  # columns: a table takes as many as it needs


def on_stdout() -> Console:
    """A console as wide as the terminal or the notebook; where there is neither, as wide as what is printed."""
    console = Console(highlight=False)
    return console if console.is_terminal or console.is_jupyter else Console(highlight=False, width=_UNBOUNDED)

"""The command line `lora-kernels`: one file per command, each with `add_arguments(parser)` and `run(args) -> int`."""

import argparse
import importlib
import sys

from lora_kernels._version import __version__

__all__ = ["main"]

_COMMANDS = {
    "doctor": "what this machine has, and which backend and path each dtype takes, and why",
    "verify": "check the kernels against float64 on this machine",
    "bench": "time forward and backward against what you would otherwise run",
    "tune": "measure on this GPU which form of each large product is fastest, and keep the answer",
    "inspect": "compile every kernel for GPUs that need not be there, and hold it to budgets",
    "demo": "train, adapt, save, reload and merge a small model on real text",
}


def main(argv: list[str] | None = None) -> int:
    """Run `lora-kernels` with `argv` (the process's own arguments if None) and return the exit status."""
    parser = argparse.ArgumentParser(prog="lora-kernels", description="Fused Triton kernels for LoRA.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        module = importlib.import_module(f"lora_kernels.cli.{name}")
        sub = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.add_argument("--json", metavar="FILE", help="write everything that is shown, and more, as JSON")
        sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    if args.json:
        try:
            importlib.import_module("lora_kernels.measure.machine").check_file("--json", args.json)
        except ValueError as error:
            parser.error(str(error))
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"lora-kernels {args.command}: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as in a shell

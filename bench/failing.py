"""A pytest plugin that prints a failure at once, so that a run that is cut has printed it: `-p bench.failing`."""

from typing import Any

__all__ = ["pytest_configure"]


class _AtOnce:
    """Prints the report of each test and file that failed; pytest prints them again at the end."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._print(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._print(report)

    def _print(self, report: Any) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        # a worker of pytest-xdist has no terminal; its reports come to the main process
        if report.failed and reporter:
            reporter.ensure_newline()
            reporter.write_sep("_", f"{report.nodeid} ({report.when})" if hasattr(report, "when") else report.nodeid)
            report.toterminal(reporter._tw)


def pytest_configure(config: Any) -> None:
    """Register the plugin."""
    config.pluginmanager.register(_AtOnce(config), "failing_at_once")

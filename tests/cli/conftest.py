"""What tests of commands share."""

import pytest

from dask_imgread.cli.main import main


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Run a command in this process; return its status, and what it printed."""
    monkeypatch.setattr("dask_imgread.cli.commands.start_logging", lambda log_format: None)

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run

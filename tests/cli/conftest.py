"""What tests of the command line share."""

import pytest

from onelaunch import cli


@pytest.fixture
def onelaunch(capfd):
    """Run the command line in this process; gives (exit code, standard output, standard error),
    with what libraries write to the descriptors themselves."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in argv])
        return code, *capfd.readouterr()

    return run

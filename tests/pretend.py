"""A pytest plugin: tests run on the pretended device (`helpers_device`) where their programs pick one by themselves.

    python -m pytest -p tests.pretend -n 2

It shows, on any machine, which tests need a CPU without asking for it, and programs that mix devices.
"""

import pytest

from tests.helpers_device import pretended

# tests of the pretence itself, and of what stands for a GPU's captures on a CPU
NOT_PRETENDED = ("test_devices", "test_launches")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """The fixtures of a test included."""
    if item.module.__name__.rpartition(".")[2] in NOT_PRETENDED:
        return (yield)
    patch = pytest.MonkeyPatch()
    try:
        with pretended(patch):
            return (yield)
    finally:
        patch.undo()

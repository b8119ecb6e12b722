"""A pytest plugin: tests run on the pretended device (`helpers_device`) where their programs pick one by themselves.

    python -m pytest -p tests.pretend -n 2

It shows, on any machine, which tests need a CPU without asking for it, and programs that mix devices.
"""

import pytest

from tests.helpers_device import pretended

NOT_PRETENDED = (
    "test_devices",  # pretends by itself
    "test_launches",
    "test_bf16_trains_close_to_fp32",  # a pretended device has no autocast
    "test_a_step_copies_to_the_host_once",  # counts calls that the pretence makes too
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """The fixtures of a test included."""
    if item.path.stem in NOT_PRETENDED or item.originalname in NOT_PRETENDED or item.get_closest_marker("on_cpu"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch, pretended(patch):
        return (yield)

"""Signals that ask a run to stop: noted, and obeyed where nothing is lost by it."""

import contextlib
import signal

from training.state import TrainState


@contextlib.contextmanager
def signals_noted(state: TrainState):
    """SIGTERM and SIGINT are noted in the state, for the end of the step; where it is interruptible, they interrupt."""

    def note(number, frame):
        state.stop_signal = number
        if state.interruptible:
            raise KeyboardInterrupt

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible(state: TrainState):
    """A signal interrupts the block, or keeps it from beginning: then the state is stopping."""
    state.interruptible = True
    try:
        if state.stop_signal:  # it came since the last step
            raise KeyboardInterrupt
        yield
    except KeyboardInterrupt:
        state.stopping = state.interrupted = True
    finally:
        state.interruptible = False


def leave_signals_to_the_main_process(worker) -> None:
    """A scheduler's SIGTERM goes to every process of a job; the loading ones must live until the step is finished."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

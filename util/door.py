"""The door of every program: what it prints always gets out, and an exception becomes an exit code and a line.

2    the user's: a ValueError that this repository raises, an OSError, a device too small, processes without devices
1    training that diverged, a process of the run that ended, and what is the code's own fault: with its traceback
130  Ctrl-C, once the program is imported; before, while torch is, Python gives a traceback: a handler for that would
     have to be installed in every program above its imports, and nothing has begun that could be lost
"""

import sys
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
PEER = "another process of this run has ended or cannot be reached: its own message says why"
# what gloo and NCCL say when a peer is gone
PEER_SIGNS = ("closed by peer", "reset by peer", "Timed out", "Socket Timeout", "Broken pipe", "remote process exited")


def run_main(main, argv=None) -> int:
    """Exit code of main(argv); see above. An exception that is nobody's input but a fault of the code is not hidden."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show an é is no reason to end a run
            stream.reconfigure(errors="replace")
    pythons, warnings.formatwarning = warnings.formatwarning, warning_line  # processes that load images have it too
    try:
        return main(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line, code = explain(error)
        if line is None:
            traceback.print_exc()
            line = f"internal error, not your input: {type(error).__name__}; please report the lines above"
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
        return code
    finally:
        warnings.formatwarning = pythons


def warning_line(message, category, filename, lineno, line=None) -> str:
    """A warning as one line, in the place of Python's two, which quote the code that raised it."""
    return f"warning: {' '.join(str(message).split())}\n"


def explain(error: Exception) -> tuple[str | None, int]:
    """(what to say, None for what only a traceback explains; exit code)."""
    if isinstance(error, FloatingPointError):
        return str(error), 1
    if isinstance(error, OSError) or (isinstance(error, ValueError) and is_raised_in_this_repository(error)):
        return str(error), 2
    if isinstance(error, ModelTooLarge):
        return str(error), 2
    if is_out_of_memory(error):
        return f"out of memory: lower --batch_size in training, --eval_bsz in sampling ({str(error)[:150]})", 2
    if "Duplicate GPU detected" in str(error):
        return "two processes share a GPU: --nproc_per_node must be at most the number of GPUs", 2
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in PEER_SIGNS):
        return PEER, 1
    return None, 1


class ModelTooLarge(MemoryError):
    """Memory ran out while a model was made, which a smaller batch does not help."""


@contextmanager
def making_a_model():
    """Running out of memory in the block raises ModelTooLarge."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "choose a smaller --model, or lower the flags of its sizes, such as --diffloss_w or --width"
        raise ModelTooLarge(f"the model is too large for the memory: {advice} ({str(error)[:150]})") from None


def is_raised_in_this_repository(error: Exception) -> bool:
    """Was it this repository's own check that failed? A library's ValueError is a fault that nobody foresaw."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return True
    file = place.tb_frame.f_code.co_filename
    return file.startswith(ROOT) and "site-packages" not in file  # .venv may be in the repository


def is_out_of_memory(error: Exception) -> bool:
    """Of a device, or of the CPU, whose allocator has no kind of its own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )

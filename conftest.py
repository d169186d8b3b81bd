"""Before anything imports Triton: without a GPU, its kernels run in the interpreter, in every process of the tests."""

import os
import signal

import torch

pytest_plugins = ["pytester", "tests.support.costs", "tests.support.quick", "tests.support.skips"]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts what runs in its background so, and tests that interrupt a command of ours would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    from hypothesis import settings
except ImportError:  # a lent GPU machine may have pytest and no more
    pass
else:
    # Time is not truth on a machine that others use too.
    settings.register_profile("shared-machine", deadline=None)
    settings.load_profile("shared-machine")

"""What holds for every test."""

import signal

# Started in the background, this process ignores SIGINT, and so would every child
# that a test wants to interrupt: a signal that is handled here is back at its
# default after exec, one that is ignored is not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

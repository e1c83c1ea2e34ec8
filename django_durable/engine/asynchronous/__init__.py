"""Async workflows: the body and its async steps run on an event loop, what they need of the database in one thread.

Each call gets its position when it is made, on the loop. Outcomes are shown to the body one at a time, in the order
in which they came about, and each only when the body has gone as far as it can with those before. So a replay, which
shows the recorded outcomes in the same order, meets the same calls at the same positions, whatever finished first.

A worker has one loop, in a thread of its own. The thread that holds a run serves as its database thread meanwhile:
the engine's statements and the user's thread-sensitive calls, one at a time, on that thread's connections. A workflow
that is awaited directly runs on its caller's loop, and its database work goes where asgiref sends the caller's.

From the bottom up: `loop` and `threads`; `attempts`, what a call does, and `step_attempts`; `pending`, the calls that
wait for their outcomes; `turns`, in which they are shown, and `parking`; `body`, one execution of the function. What
a body awaits is made in `awaitables`; `driver` runs a body from the thread that holds its run.
"""

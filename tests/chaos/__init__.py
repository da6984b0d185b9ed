"""Faults without end: the real program between a real broker and a real PostgreSQL, killed, cut, stalled and robbed.

    python -m tests.chaos --messages 20000 --rate 400 --kills 15 --db-crashes 4 --cuts 10 --broker-restarts 2
    python -m tests.chaos --payload constant --rate 3000 --messages 60000 --kills 5
    python -m tests.chaos --backlog --payload cyclic --messages 100000 --kills 5
    python -m tests.chaos --outage 120 --rate 500 --messages 90000 --kills 3
    python -m tests.chaos --quick --without-ledger       # proves that the test can fail
    python -m tests.chaos.proofs --list                  # the large runs of docs/guarantees.md

At the end what was published is compared with what is stored. The exit code is 0 when nothing is lost, duplicated or
different, nothing is left at the broker, every account balanced, and every fault was really done. The schedule of
faults depends on the parameters and the seed alone; what the machine makes of it does not.
"""

"""Faults without end: the real program between a real broker and a real PostgreSQL, killed, cut, stalled and robbed.

    python -m tests.chaos --messages 20000 --rate 400 --kills 15 --db-crashes 4 --cuts 10 --broker-restarts 2
    python -m tests.chaos --payload constant --rate 3000 --messages 60000 --kills 5
    python -m tests.chaos --backlog --payload constant --messages 100000 --kills 5
    python -m tests.chaos --quick --without-ledger       # proves that the test can fail

At the end what was published is compared with what is stored. The exit code is 0 when nothing is lost, duplicated or
different. The schedule of faults depends on the parameters and the seed alone; what the machine makes of it does not.
"""

"""A deterministic simulation of a whole run under faults: the real code, one thread at a time.

Servers, accumulators, clients, readers, sweepers, an operator and a hostile account are processes (`process`) on one
store in memory whose operations fail, lose their replies, land late or list what is no longer true (`storage`),
behind a network that does the same to requests (`network`). Whoever is next is drawn at every blob operation and
every request (`scheduler`), from the seed alone. What comes of it is compared with what was promised: by `ledger` as
it happens, by `oracle` at the end, by `reference` for the bits. `mutants` are wrong variants of real functions, each
of which has to be caught.

    python -m tests.faults.simulator 17                  run seed 17
    python -m tests.faults.simulator 17 --trace          and print every operation
    python -m tests.faults.simulator 17 --shrink         find the fewest faults that still show what is wrong
    python -m tests.faults.simulator 0-999               many seeds
    python -m tests.faults.simulator 0-74 --mutant NAME  how many of them catch a mutant
"""

"""The benchmark: outbox-relay beside its rivals, in one run on one machine. `make bench` runs it."""

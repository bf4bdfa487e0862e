"""`mx explain`: where a worker would take weights from, in order, and why."""

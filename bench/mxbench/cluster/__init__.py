"""`mx bench cluster`: many machines, their links, fan-out of a model, storage once for all, a worker killed."""

"""Who has what: records of workers, their epochs and their leases, behind one interface."""

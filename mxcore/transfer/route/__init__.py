"""Which ways bytes can take between two workers, each proven by use, and devices that are proven."""

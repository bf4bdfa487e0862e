"""What the server tells of itself: metrics, loads, events, measured calls and store."""

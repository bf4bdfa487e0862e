"""Workers that lie, readers that try to write, strangers that call: what `mx bench chaos` and the soak are made of."""

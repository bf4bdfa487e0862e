"""Where the server downloads models from: the hub, object stores, folders."""

"""Files from the server's model cache: a client for streams over HTTP/2, whole or partly there."""

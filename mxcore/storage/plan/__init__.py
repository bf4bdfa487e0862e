"""What is read, in which way, within which limit of host memory."""

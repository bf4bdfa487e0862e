"""C that several compiled packages share: threads with jobs, clock, copies, CPU features."""

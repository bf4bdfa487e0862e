"""The environment as C libraries see it (getenv), changed without harm to threads that read it meanwhile.

`os.environ` calls setenv, which glibc allows only while no thread is in getenv; a worker has many such threads. What is
put here is seen by C libraries and by child processes that inherit the environment, not by `os.environ`.
"""

def c_getenv(name: str) -> str | None:
    """The value that C libraries get."""

def c_setenv(name: str, value: str | None) -> None:
    """Gives `name` a value, or takes it out (None). Safe beside getenv and other calls of this, not beside setenv.

    Entries are never freed, so only a few values are to be put. Raises ValueError for a name or value that cannot be,
    MemoryError.
    """

"""For images in which vLLM discovers no plugins: `--worker-cls vllm_plugin.worker.MxWorker`.

vLLM imports a worker class by its name in each process that loads weights, before the loader is looked up; importing
this one registers the load formats there. The class is the platform's own in everything.
"""

from __future__ import annotations

import vllm_plugin
from vllm_plugin import compat

__all__ = ["MxWorker"]

vllm_plugin.register()


class MxWorker(compat.platform_worker()):  # type: ignore[misc]  # which one is known only here
    """The platform's worker, in a process where the load formats are registered."""
